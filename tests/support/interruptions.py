"""Interruption of training runs."""

import itertools
import signal

from dit_video.training.step import TrainStep


def interrupt(monkeypatch, *, call, how):
    """Interrupt the run at the given `call` of its step: by Ctrl-C, or as if it were killed, with nothing saved."""
    real = TrainStep.compile

    def compile_step(*arguments, **keywords):
        step, calls = real(*arguments, **keywords), itertools.count(1)

        def interrupted(state, batch):
            if next(calls) == call:
                if how == "killed":
                    raise KeyboardInterrupt
                signal.raise_signal(signal.SIGINT)
            return step(state, batch)

        return interrupted

    monkeypatch.setattr(TrainStep, "compile", compile_step)
