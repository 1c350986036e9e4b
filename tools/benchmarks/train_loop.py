"""Overhead of the training loop: its own work, the hash chain, saving in the background, starting and restarting."""

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

from benchmarks.settings import Setting, SyntheticBatches
from benchmarks.steps import TrainingSetup, make_denoiser_parts, make_training_setup
from dit_video.core.errors import UserError
from dit_video.training.checkpoint import Checkpoints
from dit_video.training.hooks.hash_chain import CHAIN_FILE, HashChain
from dit_video.training.hooks.hook import StepCall
from dit_video.training.hooks.logging import MetricsLog
from dit_video.training.loop import LoopConfig, run
from dit_video.training.state import replace_step
from dit_video.training.step import Metrics, StepFn, get_scalars

_WARMUP_STEPS = 3
"""Number of untimed steps at the start of every measurement."""
_DEFAULT_SAVE_EVERY = 500
"""Number of steps between two saves, if the config does not set it."""
_STEPS_BEFORE_KILL = 6
"""Number of steps after the first one until a checkpoint is complete."""
_WORKER = Path(__file__).with_name("restart_worker.py")


def measure(
    setting: Setting, steps: int, num_examples: int, rounds: int, worker_arguments: Sequence[str] = ()
) -> dict[str, Any]:
    """Measure everything, with the denoiser of a setting on random latents.

    Args:
      setting: The setting to train.
      steps: Number of timed steps of every measurement, and of steps between two saves.
      num_examples: Number of examples.
      rounds: Number of rounds of interleaved measurements.
      worker_arguments: Command-line arguments that select the same setting in the worker whose starts are timed.
    """
    trained = make_training_setup(setting, *make_denoiser_parts(setting))
    undigested_step = _drop_digests(trained.step)
    batches = list(itertools.islice(SyntheticBatches(setting, num_examples), 8))
    figures: dict[str, Any] = {"steps": steps, "rounds": rounds}
    with tempfile.TemporaryDirectory() as folder:
        kinds = {
            "bare": lambda trained: _time_bare_step(trained, trained.step, batches, steps),
            "undigested": lambda trained: _time_bare_step(trained, undigested_step, batches, steps),
            "loop": lambda trained: _time_loop(trained, batches, steps, Path(folder), save=False),
            "saving": lambda trained: _time_loop(trained, batches, steps, Path(folder), save=True),
        }
        seconds, trained = _time_alternately(kinds, trained, rounds)
    save_every = getattr(setting, "save_every", _DEFAULT_SAVE_EVERY)
    save_seconds = steps * statistics.median(
        saving - looped for looped, saving in zip(seconds["loop"], seconds["saving"], strict=True)
    )
    looped = statistics.median(seconds["loop"])
    figures |= {
        "step_ms": round(1000 * statistics.median(seconds["bare"]), 3),
        "undigested_step_ms": round(1000 * statistics.median(seconds["undigested"]), 3),
        "loop_step_ms": round(1000 * looped, 3),
        "loop_overhead": round(_compare(seconds["loop"], seconds["bare"]), 4),
        "digest_overhead": round(_compare(seconds["bare"], seconds["undigested"]), 4),
        "save_seconds": round(save_seconds, 4),
        "save_overhead": {f"every {n} steps": round(save_seconds / n / looped, 4) for n in sorted({steps, save_every})},
    }
    return figures | measure_starts(worker_arguments)


def _compare(seconds: Sequence[float], reference: Sequence[float]) -> float:
    """Return by what share a kind takes longer than another one, as the median over the rounds."""
    return statistics.median(each / other - 1 for each, other in zip(seconds, reference, strict=True))


def _drop_digests(step: StepFn) -> StepFn:
    """Return a step that does not compute the digests of its batch, as XLA removes what is not returned."""

    def update(state: Any, batch: Any) -> tuple[Any, Metrics]:
        state, metrics = step(state, batch)
        return state, get_scalars(metrics)

    return jax.jit(update, donate_argnums=0)


def _time_alternately(
    kinds: dict[str, Callable[[TrainingSetup], tuple[float, TrainingSetup]]], setup: TrainingSetup, rounds: int
) -> tuple[dict[str, list[float]], TrainingSetup]:
    """Return the seconds per step of every kind in every round, in alternating order.

    Other load on the machine affects all kinds of a round alike, so kinds are compared within each round.
    """
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for number in range(rounds):
        for kind in list(kinds)[:: -1 if number % 2 else 1]:
            each, setup = kinds[kind](setup)
            seconds[kind].append(each)
    return seconds, setup


def _time_bare_step(setup: TrainingSetup, step: StepFn, batches: list[Any], steps: int) -> tuple[float, TrainingSetup]:
    """Time a step and the transfer of its batch, at most two steps ahead as in the loop."""
    state, place = setup.state, setup.place_batch
    pending: list[Any] = []
    start_time = 0.0
    for number in range(_WARMUP_STEPS + steps):
        if number == _WARMUP_STEPS:
            jax.block_until_ready(state)
            start_time = time.perf_counter()
        state, metrics = step(state, place(batches[number % len(batches)]))
        pending.append(metrics["loss"])
        if len(pending) > 2:
            jax.block_until_ready(pending[-3])
    jax.block_until_ready(state)
    return (time.perf_counter() - start_time) / steps, setup._replace(state=state)


def _time_loop(
    setup: TrainingSetup, batches: list[Any], steps: int, folder: Path, *, save: bool
) -> tuple[float, TrainingSetup]:
    """Time the loop with its log and its hash chain.

    With `save`, one save is within the timed steps, and one before, which compiles.
    """
    run_folder = folder / "run"
    shutil.rmtree(run_folder, ignore_errors=True)
    checkpoints = Checkpoints(run_folder / "checkpoints") if save else None
    first = steps + steps // 2 if save else _WARMUP_STEPS
    last, marks = first + steps, dict[int, float]()

    def mark(done: int, state: Any) -> None:
        if done in (first, last):
            if checkpoints is not None and done == first:
                checkpoints.wait()
            jax.block_until_ready(state)
            marks[done] = time.perf_counter()

    def endless(_start: int) -> Iterator[Any]:
        for number in itertools.count():
            yield setup.place_batch(batches[number % len(batches)])

    state = run(
        setup.step,
        replace_step(setup.state, jnp.zeros((), jnp.int32)),
        endless,
        config=LoopConfig(steps=last + 1, log_every=20, save_every=steps if save else last + 1),
        checkpoints=checkpoints,
        hooks=[
            HashChain(run_folder / CHAIN_FILE, {}, read_digests=lambda _: {}),
            MetricsLog(run_folder / "metrics.jsonl"),
            StepCall(mark),
        ],
    )
    return (marks[last] - marks[first]) / steps, setup._replace(state=state)


def measure_starts(worker_arguments: Sequence[str]) -> dict[str, Any]:
    """Measure the seconds from a process's start to the end of its first step, of a new run and of a killed one.

    The first process compiles; the second one uses the kept programs and restores a checkpoint.

    Args:
      worker_arguments: Command-line arguments of the worker that select the setting.
    """
    with tempfile.TemporaryDirectory() as folder:
        start, _ = _run_until_step(folder, worker_arguments, extra_steps=_STEPS_BEFORE_KILL)
        restart, step = _run_until_step(folder, worker_arguments, extra_steps=0)
    return {
        "start_to_first_step_seconds": start,
        "restart_to_first_step_seconds": restart,
        "restarted_after_step": step - 1,
    }


def _run_until_step(folder: str, worker_arguments: Sequence[str], *, extra_steps: int) -> tuple[float, int]:
    """Return the seconds to the first step and its number; the process is killed after `extra_steps` further steps."""
    # With programs kept by an earlier process, the first start would not compile.
    inherited = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    start_time = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, str(_WORKER), folder, *worker_arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={**inherited, "PYTHONPATH": os.pathsep.join([str(_WORKER.parents[2]), str(_WORKER.parents[1])])},
    )
    assert process.stdout is not None
    try:
        steps = []
        for line in process.stdout:
            if line.startswith("step "):
                steps.append((time.perf_counter() - start_time, int(line.split()[1])))
            if len(steps) > extra_steps:
                break
        else:
            raise UserError("the timed run failed before it was killed; see its error above")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    return round(steps[0][0], 2), steps[0][1]
