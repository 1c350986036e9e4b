"""Train in a folder, for a test that ends this process by a signal; the arguments are a case below and the folder."""

import os
import signal
import sys
import time
from pathlib import Path

from dit_video.training.loop import LoopConfig
from support.loop_training import train


def train_slowly(folder: Path) -> None:
    """Take at least 10 ms for every step."""
    print("ready", flush=True)
    train(folder, LoopConfig(steps=60, log_every=1, save_every=9), on_step=lambda *_: time.sleep(0.01))


def hang(folder: Path) -> None:
    """Hang after a signal, in the seventh step."""

    def on_step(done, _):
        if done == 7:
            while not Path(folder, "checkpoints", "5").is_dir():
                time.sleep(0.02)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(600)

    train(folder, LoopConfig(steps=60, save_every=5, preemption_grace=0.5), on_step=on_step)


CASES = {"slow": train_slowly, "hang": hang}

if __name__ == "__main__":
    CASES[sys.argv[1]](Path(sys.argv[2]))
