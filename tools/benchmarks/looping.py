"""What the training loop costs beside its step: its own work, saving in the background, starting and starting again."""

import itertools
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.setting import Packed, Setting
from benchmarks.steps import Trained, denoiser_parts, trainable
from dit_video.core.errors import UserError
from dit_video.training.checkpoint import Checkpoints
from dit_video.training.hooks.logging import MetricsLog
from dit_video.training.loop import LoopConfig, run
from dit_video.training.state import with_step

_WARM = 3
"""steps before those that are timed, of every stretch"""
_EVERY = 500
"""steps between two saves, where the config doesn't say"""
_SAVED = 6
"""steps after the first one, by when a checkpoint is whole"""
_WORKER = Path(__file__).with_name("restarting.py")


def measure(setting: Setting, steps: int, number: int, rounds: int, command: Sequence[str] = ()) -> dict[str, Any]:
    """All of it, with the denoiser of a setting on random latents.

    Args:
      setting: what is trained.
      steps: that are timed in every stretch; a save is made after as many.
      number: of examples.
      rounds: of stretches that are compared in turn.
      command: says the same setting to the worker whose starts are timed.
    """
    trained = trainable(setting, *denoiser_parts(setting))
    batches = list(itertools.islice(Packed(setting, number), 8))
    found: dict[str, Any] = {"steps": steps, "rounds": rounds}
    with tempfile.TemporaryDirectory() as folder:
        kinds = {
            "bare": lambda trained: _bare(trained, batches, steps),
            "loop": lambda trained: _looped(trained, batches, steps, Path(folder), save=False),
            "saving": lambda trained: _looped(trained, batches, steps, Path(folder), save=True),
        }
        seconds, trained = _in_turn(kinds, trained, rounds)
    every = getattr(setting, "save_every", _EVERY)
    of_the_loop = statistics.median(
        looped / bare - 1 for bare, looped in zip(seconds["bare"], seconds["loop"], strict=True)
    )
    of_a_save = steps * statistics.median(
        saving - looped for looped, saving in zip(seconds["loop"], seconds["saving"], strict=True)
    )
    looped = statistics.median(seconds["loop"])
    found |= {
        "step_ms": round(1000 * statistics.median(seconds["bare"]), 3),
        "loop_step_ms": round(1000 * looped, 3),
        "loop_overhead": round(of_the_loop, 4),
        "save_seconds": round(of_a_save, 4),
        "save_overhead": {f"every {n} steps": round(of_a_save / n / looped, 4) for n in sorted({steps, every})},
    }
    return found | measure_starts(command)


def _in_turn(
    kinds: dict[str, Callable[[Trained], tuple[float, Trained]]], trained: Trained, rounds: int
) -> tuple[dict[str, list[float]], Trained]:
    """Seconds a step of every kind in every round, in an order that alternates. What else the machine does falls on all
    of a round, so what is compared is compared in each."""
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for number in range(rounds):
        for kind in list(kinds)[:: -1 if number % 2 else 1]:
            each, trained = kinds[kind](trained)
            seconds[kind].append(each)
    return seconds, trained


def _bare(trained: Trained, batches: list[Any], steps: int) -> tuple[float, Trained]:
    """The step and the transfer of its batch, two steps ahead as in the loop."""
    step, state, place = trained.step, trained.state, trained.place
    pending: list[Any] = []
    began = 0.0
    for number in range(_WARM + steps):
        if number == _WARM:
            jax.block_until_ready(state)
            began = time.perf_counter()
        state, metrics = step(state, place(batches[number % len(batches)]))
        pending.append(metrics["loss"])
        if len(pending) > 2:
            jax.block_until_ready(pending[-3])
    jax.block_until_ready(state)
    return (time.perf_counter() - began) / steps, trained._replace(state=state)


def _looped(trained: Trained, batches: list[Any], steps: int, folder: Path, *, save: bool) -> tuple[float, Trained]:
    """The loop with its log; with `save` a save lies in the middle of the time, and one before it, which compiles."""
    place = folder / "run"
    shutil.rmtree(place, ignore_errors=True)
    checkpoints = Checkpoints(place / "checkpoints") if save else None
    first = steps + steps // 2 if save else _WARM
    last, marks = first + steps, dict[int, float]()

    def mark(done: int, state: Any) -> None:
        if done in (first, last):
            if checkpoints is not None and done == first:
                checkpoints.wait()
            jax.block_until_ready(state)
            marks[done] = time.perf_counter()

    def endless(_start: int) -> Iterator[Any]:
        for number in itertools.count():
            yield trained.place(batches[number % len(batches)])

    state = run(
        trained.step,
        with_step(trained.state, jnp.zeros((), jnp.int32)),
        endless,
        config=LoopConfig(steps=last + 1, log_every=20, save_every=steps if save else last + 1),
        checkpoints=checkpoints,
        log=MetricsLog(place / "metrics.jsonl"),
        on_step=mark,
    )
    return (marks[last] - marks[first]) / steps, trained._replace(state=state)


def measure_starts(command: Sequence[str]) -> dict[str, Any]:
    """Seconds from a process's start to the end of its first step: of a new run, and of one that was killed.

    The first one compiles; what it compiled is kept for the second, which restores a checkpoint.

    Args:
      command: says the setting, as arguments of the worker.
    """
    with tempfile.TemporaryDirectory() as folder:
        start, _ = _until_step(folder, command, more=_SAVED)
        again, at = _until_step(folder, command, more=0)
    return {
        "start_to_first_step_seconds": start,
        "restart_to_first_step_seconds": again,
        "restarted_after_step": at - 1,
    }


def _until_step(folder: str, command: Sequence[str], *, more: int) -> tuple[float, int]:
    """Seconds to the first step, and its number; the process is killed after `more` further ones."""
    # Programs that were kept before would make the first start another one's second.
    inherited = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, str(_WORKER), folder, *command],
        stdout=subprocess.PIPE,
        text=True,
        env={**inherited, "PYTHONPATH": os.pathsep.join([str(_WORKER.parents[2]), str(_WORKER.parents[1])])},
    )
    assert process.stdout is not None
    try:
        steps = []
        for line in process.stdout:
            if line.startswith("step "):
                steps.append((time.perf_counter() - began, int(line.split()[1])))
            if len(steps) > more:
                break
        else:
            raise UserError("the run that was to be timed ended by itself; its error is above")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    return round(steps[0][0], 2), steps[0][1]
