"""Lock a folder in two processes of one run, print what came of it; the argument is the folder."""

import sys
import time
from pathlib import Path

import jax

from dit_video.core.errors import UserError
from dit_video.training.folder_lock import LeaseConfig, lock_folder
from support.devices import join_processes


def main() -> None:
    """Join the processes, and lock the folder."""
    join_processes()
    folder = Path(sys.argv[1])
    if jax.process_index() == 0:
        time.sleep(1)  # the other one must not go on without the lock
    try:
        with lock_folder(folder, config=LeaseConfig(renew_every=0.2, expires_after=2.0)):
            print("held", jax.process_index() > 0 or (folder / ".lease-000001").exists())
    except UserError as error:
        print("error", type(error).__name__, error.code, error)


if __name__ == "__main__":
    main()
