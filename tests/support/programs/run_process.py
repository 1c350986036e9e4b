"""A process of a distributed run, which other processes may join.

Its arguments are the name of a case below, and JSON with the fields `config`, `code`, `timeouts` and `lost_process`.
"""

import json
import os
import signal
import sys
import time

import numpy as np
from jax.experimental import multihost_utils

from dit_video.core.errors import UserError, script
from dit_video.distributed.heartbeat import TimeoutConfig, count_step
from dit_video.distributed.processes import initialize_distributed, wait_for_main_process

INDEX = int(os.environ["PROCESS_ID"])


def gather(value: int) -> list[int]:
    """Return the values of all processes."""
    return multihost_utils.process_allgather(np.asarray(value)).tolist()


def wait_in_first_process() -> None:
    """Let process 1 leave three seconds before process 0."""
    time.sleep(3 * (1 - INDEX))


def write_in_first_process() -> None:
    """Let process 1 wait longer than `max_lag` for process 0, at the same step."""
    count_step()
    time.sleep(20 * (1 - INDEX))
    wait_for_main_process()
    count_step()


def kill() -> None:
    """Kill this process."""
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    """Stop this process, without an end."""
    os.kill(os.getpid(), signal.SIGSTOP)


def sleep() -> None:
    """Take longer than the others wait."""
    time.sleep(600)


def fail() -> None:
    """Fail with an error that a user can act on."""
    raise UserError("the disk is full")


LOSSES = {"kill": kill, "stop": stop, "sleep": sleep, "fail": fail}
"""Cases in which one process is lost to the others."""


@script
def main() -> None:
    """Join the other processes, run the case, and leave."""
    case, options = sys.argv[1], json.loads(sys.argv[2])
    with initialize_distributed(
        options.get("config"), code=options.get("code"), timeouts=TimeoutConfig(**options["timeouts"])
    ):
        print("joined", gather(INDEX), flush=True)
        if case == "wait in first process":
            wait_in_first_process()
        elif case == "write in first process":
            write_in_first_process()
        elif case in LOSSES:
            gather(0)
            if options["lost_process"] == INDEX:
                LOSSES[case]()
            count_step()
            count_step()
            gather(1)
        print("left", flush=True)


if __name__ == "__main__":
    main()
