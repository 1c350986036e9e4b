"""A process of a distributed run, which other processes may join.

Its arguments are the name of a case below, and JSON with the fields `config`, `code`, `timeouts` and `lost_process`.
"""

import json
import os
import signal
import sys
import time

import jax
import numpy as np
from jax.experimental import multihost_utils

from dit_video.core.errors import EXIT_TRY_AGAIN, AgreedStop, TransientError, UserError, script
from dit_video.distributed.faults.progress import count_progress, declare_phase, expect_progress, expect_steps
from dit_video.distributed.faults.timeouts import TimeoutConfig
from dit_video.distributed.processes import initialize_distributed, wait_for_main_process

INDEX = int(os.environ["PROCESS_ID"])


def gather(value: int) -> list[int]:
    """Return the values of all processes."""
    return multihost_utils.process_allgather(np.asarray(value)).tolist()


def wait_in_first_process() -> None:
    """Let process 1 leave three seconds before process 0."""
    time.sleep(3 * (1 - INDEX))


def save_in_first_process() -> None:
    """Let process 1 wait for a phase of process 0 that is longer than a step may take."""
    with expect_steps():
        count_progress()
        if INDEX == 0:
            with declare_phase("save"):
                time.sleep(15)
        gather(0)


def encode_in_first_process() -> None:
    """Let process 1 wait for work of process 0 that counts its progress."""
    if INDEX == 0:
        with expect_progress():
            for _ in range(15):
                time.sleep(1)
                count_progress()
    wait_for_main_process()


def hang_before_training() -> None:
    """Wait forever outside of a training, as the other process does."""
    if INDEX == 0:
        time.sleep(600)
    wait_for_main_process()


def log_in_first_process() -> None:
    """Hang in the log of process 0, for which process 1 waits."""
    with expect_steps():
        count_progress()
        if INDEX == 0:
            with declare_phase("hook", "max_step"):
                time.sleep(600)
        gather(0)


def sleep_in_step() -> None:
    """Hang in a step, in which the other process hangs, too."""
    with expect_steps():
        count_progress()
        time.sleep(600)


def fail_for_a_while() -> None:
    """Fail with an error that another start may not meet."""
    if INDEX == 1:
        raise TransientError("the storage does not answer")
    time.sleep(600)


def stop_together() -> None:
    """Stop as all processes have agreed to; process 0 takes long to close its logs."""
    try:
        stopped = AgreedStop("training")
        stopped.code = EXIT_TRY_AGAIN
        raise stopped
    finally:
        time.sleep(15 * (1 - INDEX))


def kill() -> None:
    """Kill this process."""
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    """Stop this process, without an end."""
    os.kill(os.getpid(), signal.SIGSTOP)


def hang() -> None:
    """Hang in Python, while the heartbeats of JAX go on."""
    time.sleep(600)


def fail() -> None:
    """Fail with an error that a user can act on."""
    raise UserError("the disk is full")


def lose_connection() -> None:
    """Fail as where another process is too late for Gloo, which waits for 30 s."""
    message = "UNKNOWN: Gloo context initialization failed: DEADLINE_EXCEEDED: GetKeyValue() timed out with key: cpu"
    raise jax.errors.JaxRuntimeError(message)


CASES = {
    "wait in first process": wait_in_first_process,
    "save in first process": save_in_first_process,
    "encode in first process": encode_in_first_process,
    "log in first process": log_in_first_process,
    "hang before training": hang_before_training,
    "hang in all processes": sleep_in_step,
    "fail for a while": fail_for_a_while,
    "stop together": stop_together,
    "lose connection": lose_connection,
}
LOSSES = {"kill": kill, "stop": stop, "hang": hang, "fail": fail, "lose connection in one": lose_connection}
"""Cases in which one process is lost to the others."""


@script
def main() -> None:
    """Join the other processes, run the case, and leave."""
    case, options = sys.argv[1], json.loads(sys.argv[2])
    with initialize_distributed(
        options.get("config"), code=options.get("code"), timeouts=TimeoutConfig(**options["timeouts"])
    ):
        if case == "compile for long":
            time.sleep(40 * INDEX)  # Gloo waits for 30 s
        print("joined", gather(INDEX), flush=True)
        if case in CASES:
            CASES[case]()
        elif case in LOSSES:
            gather(0)
            with expect_steps():
                if options["lost_process"] == INDEX:
                    LOSSES[case]()
                count_progress()
                gather(1)
        print("left", flush=True)


if __name__ == "__main__":
    main()
