"""Do not stop after a signal that comes while steps are expected."""

import os
import signal
import time

from dit_video.training.preemption import handle_signals


def sleep_after_signal() -> None:
    """Hang after a signal."""
    with handle_signals(0, grace=600.0):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(600)


if __name__ == "__main__":
    sleep_after_signal()
