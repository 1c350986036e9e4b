"""A worker that writes down what it is given, and is lost where a clip's name says so."""

import errno
import os
import signal
import sys
import time
from pathlib import Path

from dit_video.curation.screening import ScreeningConfig
from dit_video.data.ingest import worker
from dit_video.data.ingest.formats import ListedClip
from dit_video.data.ingest.screening import Screening

folder, read = Path(os.environ["DIT_VIDEO_TEST_LOG"]), ListedClip.read


def do_as_named(name):
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
    if "held" in name and not (folder / name).exists():
        (folder / name).touch()
        parent = os.getppid()
        while os.getppid() == parent:
            time.sleep(0.02)
    if "slow" in name:
        time.sleep(0.3)
    if "memory" in name and not (folder / "mended").exists():
        raise MemoryError
    if "raise" in name:
        raise ZeroDivisionError("of a decoder,\nin two lines")
    print(f"a decoder's words about {name}", flush=True)


def wrap(screen):
    def screen_or_not(screening, encoded, name):
        do_as_named(name)
        return screen(screening, encoded, name)

    return screen_or_not


def read_or_not(clip):
    seen, mended = (folder / clip.name).exists(), (folder / "mended").exists()
    if ("unreadable" in clip.name and not mended) or ("first" in clip.name and not seen):
        (folder / clip.name).touch()
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    encoded = read(clip)
    if "rewritten" in clip.name and (not seen or ("always" in clip.name and not mended)):
        (folder / clip.name).touch()
        return encoded[:-1]
    return encoded


for each in (Screening, ScreeningConfig):
    each.screen = wrap(each.screen)
ListedClip.read = read_or_not
worker.main()
