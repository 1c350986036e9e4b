"""The training loop: restore is the caller's; batch, step, log, save are here, in that order.

The loop waits for the device when it logs and saves, and otherwise only keeps it from falling more than two steps
behind, so that the device always has work while queued batches stay few.

An entry of the log is the mean of the metrics over the steps since the entry before (or since the start of this
process), with `step_seconds` and `steps_per_second` (the first step, saving and `on_step` left out), `data_wait`, the
share of the time that went into waiting for a batch while the device had nothing to do (at most: where it ran out of
work during the wait, the whole wait counts), the device's memory where it tells that, and once `first_step_seconds`,
most of which is compilation. What periodic calls find is logged at their step, `Watch.derive` adds to every entry.

A step whose loss or gradient is not finite leaves the state as it was (`training.step` sees to it), is counted in the
log as `skipped`, and is written down with its batch. After `LoopConfig.most_skipped` of them in a row the run ends, and
saves the state from before them.

SIGINT and SIGTERM end the run after the step that runs, which is saved, with a `Stopped`; a second one at once. With
several processes all stop after the same step (see `training.stopping`).
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from dit_video.core import trees as trees
from dit_video.core.errors import Stopped, UserError
from dit_video.training.checkpoint import Checkpoints
from dit_video.training.hooks.log_interval import Identify, Interval, NotFinite, TooManySkipped
from dit_video.training.hooks.logging import Progress
from dit_video.training.hooks.profiler import Profile, Tracer
from dit_video.training.hooks.skipped_steps import SkippedLog
from dit_video.training.hooks.writers import Log
from dit_video.training.preemption import signals


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long a run is, and how often it logs and saves, in steps. The last step is always logged and saved.

    Raises:
      UserError: a number that is not positive.
    """

    steps: int
    log_every: int = 20
    save_every: int = 500
    most_skipped: int = 10
    """steps in a row without a finite loss and gradient, after which the run ends"""
    stop_within: float = 300.0
    """seconds from a signal to the end of the process, at most; a preempted machine has 30 or so"""

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "save_every", "most_skipped"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is at least 1, not {getattr(self, name)}; give a positive number of steps")


@dataclass(frozen=True, kw_only=True)
class Periodic:
    """Something done every so many steps, and after the last one."""

    every: int
    call: Callable[[int, Any], Mapping[str, float]]
    """Given the number of steps done and the state, which it must not keep; what it returns is logged. All processes
    call it."""

    def due(self, done: int, steps: int) -> bool:
        return done % self.every == 0 or done == steps


@dataclass(frozen=True, kw_only=True)
class Watch:
    """What is looked at on the way, besides the log."""

    identify: Identify | None = None
    """says which batch one was"""
    skipped: SkippedLog | None = None
    """where the steps that were skipped are written down, with their batches"""
    derive: Callable[[Mapping[str, float]], Mapping[str, float]] | None = None
    """further figures of an entry of the log, from those that it has"""
    periodic: tuple[Periodic, ...] = ()
    profile: Profile | None = None
    """steps that are traced"""


def run(
    step: Callable[[Any, Any], tuple[Any, dict[str, Array]]],
    state: Any,
    batches: Callable[[int], Iterator[Any]],
    *,
    config: LoopConfig,
    checkpoints: Checkpoints | None = None,
    log: Log | None = None,
    title: str = "training",
    on_step: Callable[[int, Any], None] | None = None,
    meta: Mapping[str, Any] | None = None,
    watch: Watch | None = None,
) -> Any:
    """Train from `state.step` to `config.steps`, and return the last state.

    What an entry of the log says, and what signals do, is told at the top of this file.

    Args:
      step: `(state, batch) -> (state, metrics)`, jitted; it may donate the state. Metrics are scalar arrays, among
        them `loss`. It counts `state.step`.
      batches: given the number of steps done, yields the batches from there on.
      on_step: called with the number of steps done and the state, which it must not keep.
      meta: saved with every checkpoint.
      watch: what else is looked at on the way.

    Raises:
      UserError: the run is beyond `config.steps` or its folder holds a later checkpoint; the data end early; the loss
        is not finite in a step that doesn't skip this, or in `config.most_skipped` in a row that do; the state is not
        finite (such a state is never saved).
      Stopped: after a signal.
      KeyboardInterrupt: after a second one.
    """
    done = int(state.step)
    saver = _Saver(checkpoints, dict(meta or {}), done)
    saver.check_start(config.steps)
    log = log if jax.process_index() == 0 else None
    watch = watch or Watch()
    if log is not None:
        log.resume(done)
    if watch.skipped is not None:
        watch.skipped.resume(done)
    if done == config.steps:
        return state
    interval = Interval(done, most=config.most_skipped, identify=watch.identify, skipped=watch.skipped)
    with (
        signals(done, within=config.stop_within) as stop,
        _closing(batches(done)) as iterator,
        Progress(title, config.steps, start=done, shown=jax.process_index() == 0) as progress,
        contextlib.closing(Tracer(watch.profile)) as tracer,
    ):
        while done < config.steps and not stop.now():
            batch = interval.next(iterator, stop.now)
            if stop.now():
                break
            with tracer.step(done + 1):
                state, metrics = step(state, batch)
            done += 1
            tracer.after(done, metrics)
            with saver.guarded(done, state, interval):
                interval.add(batch, metrics)
            loss = None
            with interval.settled() if (due := _due(watch, done, config)) else contextlib.nullcontext():
                found = {name: value for one in due for name, value in one.call(done, state).items()}
            if done % config.log_every == 0 or done == config.steps or found:
                with saver.guarded(done, state, interval):
                    values = interval.entry()
                values |= {} if watch.derive is None else watch.derive(values)
                values |= {**found, **device_memory()}
                loss = values["loss"]
                saver.metrics = values
                if log is not None:
                    log.write(done, values)
            stop.passed(done)
            progress.update(done, loss)
            if on_step is not None:
                with interval.paused():
                    on_step(done, state)
            if done % config.save_every == 0:
                saver.save(done, state, interval)
        saver.save(done, state, interval)
        saver.wait()
        if stop.ended():
            raise Stopped(f"{title}, by {stop.asked} after step {done}, which is saved")
    return state


def _due(watch: Watch, done: int, config: LoopConfig) -> list[Periodic]:
    return [one for one in watch.periodic if one.due(done, config.steps)]


def device_memory() -> dict[str, float]:
    """Bytes in use on this process's first device, and the most that were; nothing where it doesn't say (CPUs)."""
    said = jax.local_devices()[0].memory_stats() or {}
    names = {"bytes_in_use": "device_memory_bytes", "peak_bytes_in_use": "device_memory_peak_bytes"}
    return {name: float(said[key]) for key, name in names.items() if key in said}


class _Saver:
    """Saves states that are finite, each once."""

    def __init__(self, checkpoints: Checkpoints | None, meta: dict[str, Any], done: int) -> None:
        self._checkpoints = checkpoints
        self._meta = meta
        self._saved = done
        self.metrics: Mapping[str, float] = {}
        """the newest entry of the log"""

    def check_start(self, steps: int) -> None:
        """Raise where the run cannot go on from here, before it costs anything."""
        if self._saved > steps:
            raise UserError(f"the run is at step {self._saved}, beyond steps={steps}; give steps={self._saved} or more")
        newest = None if self._checkpoints is None else self._checkpoints.latest()
        if newest is not None and newest > self._saved:
            raise UserError(
                f"the run starts at step {self._saved}, its folder holds a checkpoint of step {newest}; "
                "restore that one, remove it, or use another folder"
            )

    def save(self, done: int, state: Any, interval: Interval) -> None:
        """Save a state that is not saved yet.

        Raises:
          UserError: the loss or the state is not finite.
          ValueError: the step does not count itself.
        """
        if done == self._saved:
            return
        with self.guarded(done, state, interval):
            interval.check()
        self._save(done, state, interval)

    def _save(self, done: int, state: Any, interval: Interval) -> None:
        with interval.paused():
            if int(state.step) != done:
                raise ValueError(f"after {done} steps state.step is {int(state.step)}: the step must add 1 to it")
            if (path := _not_finite(state)) is not None:
                raise self._error(f"{path} is not finite after step {done}")
            if self._checkpoints is not None:
                self._checkpoints.save(done, state, self._meta, metrics=self.metrics)
            self._saved = done

    def wait(self) -> None:
        if self._checkpoints is not None:
            self._checkpoints.wait()

    @contextlib.contextmanager
    def guarded(self, done: int, state: Any, interval: Interval) -> Iterator[None]:
        """What ends a run inside is told to the user; where the state is as it was before, it is saved."""
        try:
            yield
        except NotFinite as error:
            raise self._error(str(error)) from error
        except TooManySkipped as error:
            if done != self._saved:
                self._save(done, state, interval)
            self.wait()
            where = "" if self._checkpoints is None else f" and is saved as step {done}"
            raise UserError(
                f"{error}; the state is that from before them{where}. Look at the batches in skipped.jsonl; the same "
                "command goes on behind them, a lower learning rate or stronger gradient clipping needs a new run"
            ) from error

    def _error(self, what: str) -> UserError:
        newest = None if self._checkpoints is None else self._checkpoints.latest()
        where = "nothing is saved yet" if newest is None else f"the last saved checkpoint is step {newest}"
        return UserError(
            f"{what}; {where}: start again from it with a lower learning rate or stronger gradient clipping"
        )


@jax.jit
def _finite(array: Array) -> Bool[Array, ""]:
    # Infinity is some optimizers' first value of a scalar (the best loss so far); in a tensor it is damage.
    return jnp.all(jnp.isfinite(array)) if array.ndim else ~jnp.isnan(array)


def _not_finite(state: Any) -> str | None:
    """The path of the first array that holds NaN or infinity."""
    arrays = {path: leaf for path, leaf in trees.flatten(state).items() if jnp.issubdtype(leaf.dtype, jnp.floating)}
    # One after the other: see `checkpoint._digests`.
    return next((path for path, array in arrays.items() if not _finite(array)), None)


@contextlib.contextmanager
def _closing(iterator: Iterator[Any]) -> Iterator[Iterator[Any]]:
    """Close a generator, or a loader's iterator with its processes, when the run ends."""
    try:
        yield iterator
    finally:
        if hasattr(iterator, "close"):
            iterator.close()
