"""Hold the lock of a folder or an address, and write into a file while it is held.

The arguments are the folder, the number of seconds, the interval and the time of the lease, a file to write to, and
`no-flock` for a disk without locks of the system.
"""

import errno
import fcntl
import sys
import time

from dit_video.core.errors import script
from dit_video.training.folder_lock import LeaseConfig, check_locks, lock_folder
from support import exclusive_bucket

folder, seconds, renew_every, expires_after, log, *options = sys.argv[1:]


def refuse(*_: object) -> None:
    """Fail as a disk without locks does."""
    raise OSError(errno.ENOLCK, "No locks available")


@script
def main() -> None:
    """Lock the folder, and write a line now and then."""
    exclusive_bucket.register()
    if "no-flock" in options:
        fcntl.flock = refuse  # type: ignore[assignment]
    config = LeaseConfig(renew_every=float(renew_every), expires_after=float(expires_after))
    with lock_folder(folder, config=config), open(log, "a") as file:
        print("held", flush=True)
        end = time.monotonic() + float(seconds)
        if float(seconds):
            print("end of the output", end="")  # which is kept in a buffer
        while time.monotonic() < end:
            check_locks()
            file.write("line\n")
            file.flush()
            time.sleep(0.01)


main()
