"""Try to lock many folders, each at the same time as another process, and print the numbers of those that were locked.

The arguments are the name of this process and of the other, a folder for files with which they wait for each other, the
place of the folders, their number, `no-flock` for a disk without locks of the system, and `google` for its client.
"""

import errno
import fcntl
import sys
import time
from pathlib import Path

from dit_video.core.errors import TransientError
from dit_video.training.folder_lock import LeaseConfig, lock_folder
from support import exclusive_bucket

own, other, meeting, place, count, *options = sys.argv[1:]
CONFIG = LeaseConfig(renew_every=0.2, expires_after=1.0)


def refuse(*_: object) -> None:
    """Fail as a disk without locks does."""
    raise OSError(errno.ENOLCK, "No locks available")


def meet(name: str) -> None:
    """Wait until the other process comes to the same place."""
    (Path(meeting) / f"{name}-{own}").touch()
    while not (Path(meeting) / f"{name}-{other}").exists():
        time.sleep(0.001)


if "google" not in options:
    exclusive_bucket.register()
if "no-flock" in options:
    fcntl.flock = refuse  # type: ignore[assignment]
for number in range(int(count)):
    meet(f"begin-{number}")
    try:
        with lock_folder(f"{place}/{number}", config=CONFIG):
            print(number, flush=True)
            meet(f"end-{number}")
    except TransientError as error:
        if "is in use by process" not in str(error):
            raise
        meet(f"end-{number}")
