"""Interruption of training runs."""

import dataclasses
import itertools
import signal

from dit_video.training import trainer
from dit_video.training.checkpoint import Checkpoints
from dit_video.training.step import TrainStep
from support.devices import wait_until


def wait_for_save(folder, step):
    """Wait until `step` is the newest checkpoint of a stage's folder, which a thread of this process may still write.

    `Checkpoints` that write nothing list a folder once, so each look at it is by new ones.
    """
    wait_until(lambda: Checkpoints(folder / "checkpoints").latest() == step)


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


def end_after(monkeypatch, steps):
    """End the run after this number of steps, all of which are saved, before anything else of its stage."""
    real = trainer.loop.run

    def ended(step, state, *arguments, config, **options):
        real(step, state, *arguments, config=dataclasses.replace(config, steps=steps), **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer.loop, "run", ended)
