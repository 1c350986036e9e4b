"""Interruption of training runs."""

import itertools
import signal

from dit_video.training import trainer


def interrupt(monkeypatch, *, call, how):
    """Interrupt the run at the given `call` of its step: by Ctrl-C, or as if it were killed, with nothing saved."""
    real = trainer.make_step

    def make_step(*arguments, **keywords):
        step, calls = real(*arguments, **keywords), itertools.count(1)

        def interrupted(state, batch):
            if next(calls) == call:
                if how == "killed":
                    raise KeyboardInterrupt
                signal.raise_signal(signal.SIGINT)
            return step(state, batch)

        return interrupted

    monkeypatch.setattr(trainer, "make_step", make_step)
