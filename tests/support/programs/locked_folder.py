"""Hold the lock of a folder; the arguments are the folder and for how many seconds."""

import sys
import time

from dit_video.core.errors import script
from dit_video.training.folder_lock import lock_folder


@script
def main() -> None:
    """Lock the folder and wait."""
    with lock_folder(sys.argv[1]):
        print("held", flush=True)
        time.sleep(float(sys.argv[2]))


main()
