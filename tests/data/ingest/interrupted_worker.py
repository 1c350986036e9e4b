"""A worker that writes down what it is given, and is lost where a clip's name says so."""

import os
import signal
import sys
import time
from pathlib import Path

from dit_video.data.ingest import inspection, worker

folder, screen = Path(os.environ["DIT_VIDEO_TEST_LOG"]), inspection.screen


def screen_or_not(encoded, name, config):
    with (folder / "inspected").open("a") as log:
        log.write(f"{name}\n")
    if "killed" in name or ("once" in name and not (folder / name).exists()):
        (folder / name).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if "crash" in name:
        sys.stdout.write("a decoder's last words\n")
        os._exit(7)
    if "hang" in name:
        time.sleep(600)
    if "slow" in name:
        time.sleep(0.3)
    if "raise" in name:
        raise ZeroDivisionError("of a decoder,\nin two lines")
    print(f"a decoder's words about {name}", flush=True)
    return screen(encoded, name, config)


inspection.screen = screen_or_not
worker.main()
