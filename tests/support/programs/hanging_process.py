"""A single process that hangs in one of several ways; the argument is a case below."""

import ctypes
import sys
import time

from dit_video.core.errors import script
from dit_video.distributed.faults.progress import count_progress, declare_phase, expect_steps
from dit_video.distributed.faults.timeouts import TimeoutConfig
from dit_video.distributed.processes import initialize_distributed


def sleep_in_step() -> None:
    """Hang in compiled code that lets other threads run Python."""
    ctypes.CDLL(None).sleep(600)


def sleep_with_lock() -> None:
    """Hang in compiled code that lets no other thread run Python, after the watch has begun."""
    time.sleep(0.5)
    while True:  # a signal ends a sleep
        ctypes.PyDLL(None).sleep(600)


def save_slowly() -> None:
    """Save for longer than a step may take."""
    with declare_phase("save"):
        time.sleep(3)


def work() -> None:
    """Take steps for three seconds."""
    print("working", flush=True)
    for _ in range(30):
        time.sleep(0.1)
        count_progress()


def work_in_phase() -> None:
    """Work for three seconds in a phase that may take five."""
    print("working", flush=True)
    with declare_phase("save", 5.0):
        for _ in range(30):
            time.sleep(0.1)


CASES = {"step": sleep_in_step, "save": work_in_phase, "lock": sleep_with_lock, "phase": save_slowly, "work": work}


@script
def main() -> None:
    """Take a step, then run the case."""
    with initialize_distributed(timeouts=TimeoutConfig(max_step=1.0)), expect_steps():
        count_progress()
        CASES[sys.argv[1]]()


if __name__ == "__main__":
    main()
