"""The training loop: restore is the caller's; batch, step, log, save are here, in that order.

The loop waits for the device when it logs and saves, and otherwise only keeps it from falling more than two steps
behind, so that the device always has work while queued batches stay few.

An entry of the log is the mean of the metrics over the steps since the entry before (or since the start of this
process), with `step_seconds` and `steps_per_second` (the first step, saving and `on_step` left out), `data_wait`, the
share of the time that went into waiting for a batch while the device had nothing to do (at most: where it ran out of
work during the wait, the whole wait counts), and once `first_step_seconds`, most of which is compilation.

SIGINT and SIGTERM end the run after the step that runs, which is saved, with a `Stopped`; a second one at once. With
several processes all stop after the same step (see `training.stopping`).
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from dit_video import tree as trees
from dit_video.errors import Stopped, UserError
from dit_video.training.checkpoint import Checkpoints
from dit_video.training.logging import MetricsLog, Progress
from dit_video.training.stopping import Stop, signals

_AHEAD = 2
"""How many steps may be queued on the device behind the one whose result is awaited."""


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long a run is, and how often it logs and saves, in steps. The last step is always logged and saved.

    Raises:
      UserError: a number that is not positive.
    """

    steps: int
    log_every: int = 20
    save_every: int = 500
    stop_within: float = 300.0
    """seconds from a signal to the end of the process, at most; a preempted machine has 30 or so"""

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "save_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is at least 1, not {getattr(self, name)}; give a positive number of steps")


def run(
    step: Callable[[Any, Any], tuple[Any, dict[str, Array]]],
    state: Any,
    batches: Callable[[int], Iterator[Any]],
    *,
    config: LoopConfig,
    checkpoints: Checkpoints | None = None,
    log: MetricsLog | None = None,
    title: str = "training",
    on_step: Callable[[int, Any], None] | None = None,
    meta: Mapping[str, Any] | None = None,
) -> Any:
    """Train from `state.step` to `config.steps`, and return the last state.

    What an entry of the log says, and what signals do, is told at the top of this file.

    Args:
      step: `(state, batch) -> (state, metrics)`, jitted; it may donate the state. Metrics are scalar arrays, among
        them `loss`. It counts `state.step`.
      batches: given the number of steps done, yields the batches from there on.
      on_step: called with the number of steps done and the state, which it must not keep.
      meta: saved with every checkpoint.

    Raises:
      UserError: the run is beyond `config.steps` or its folder holds a later checkpoint; the data end early; the loss
        or the state is not finite (such a state is never saved).
      Stopped: after a signal.
      KeyboardInterrupt: after a second one.
    """
    done = int(state.step)
    saver = _Saver(checkpoints, dict(meta or {}), done)
    saver.check_start(config.steps)
    log = log if jax.process_index() == 0 else None
    if log is not None:
        log.resume(done)
    if done == config.steps:
        return state
    interval = _Interval(done)
    with (
        signals(done, within=config.stop_within) as stop,
        _closing(batches(done)) as iterator,
        Progress(title, config.steps, start=done, shown=jax.process_index() == 0) as progress,
    ):
        while done < config.steps and not stop.now():
            batch = interval.next(iterator, stop)
            if stop.now():
                break
            state, metrics = step(state, batch)
            done += 1
            interval.add(metrics)
            loss = None
            if done % config.log_every == 0 or done == config.steps:
                values = saver.guard(interval.entry)
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


class _NotFinite(Exception):
    """The message says what is not finite, and at which step."""


class _Interval:
    """Metrics and time of the steps since the last entry of the log."""

    def __init__(self, done: int) -> None:
        self._done = done
        """the step that the first pending metrics follow"""
        self._pending: list[dict[str, Array]] = []
        self._newest: Array | None = None
        self._first_step: float | None = None
        self._restart()

    def _restart(self) -> None:
        self._began = time.perf_counter()
        self._timed = 0
        self._waited = 0.0

    def next(self, iterator: Iterator[Any], stop: Stop) -> Any:
        """The next batch; None where a signal to stop also ended the data (it reaches the loader's processes too)."""
        began = time.perf_counter()
        try:
            batch = next(iterator)
        except Exception as error:
            if stop.now():
                return None
            if isinstance(error, StopIteration):
                step = self._done + len(self._pending)
                raise UserError(f"the data end after step {step}; repeat them, or train for {step} steps") from error
            raise
        if self._newest is not None and self._newest.is_ready():  # type: ignore[attr-defined]  # missing in JAX's stub
            self._waited += time.perf_counter() - began
        return batch

    def add(self, metrics: dict[str, Array]) -> None:
        """Take the metrics of the step that was just started, and wait for the one that lies `_AHEAD` steps back."""
        self._pending.append(metrics)
        self._newest = metrics["loss"]
        if self._first_step is None:  # it compiles, and is timed apart
            self._newest.block_until_ready()
            self._first_step = time.perf_counter() - self._began
            self._restart()
            return
        self._timed += 1
        if len(self._pending) > _AHEAD:
            self._pending[-1 - _AHEAD]["loss"].block_until_ready()

    def check(self) -> list[dict[str, Any]]:
        """The pending metrics, fetched.

        Raises:
          _NotFinite: the loss of one of the steps is not.
        """
        fetched = jax.device_get(self._pending)
        for index, metrics in enumerate(fetched):
            if not np.isfinite(metrics["loss"]):
                raise _NotFinite(f"the loss is {float(metrics['loss'])} at step {self._done + index + 1}")
        return fetched

    def entry(self) -> dict[str, float]:
        """What the log says of these steps; a new interval begins."""
        fetched = self.check()
        values = {name: float(np.mean([np.float64(metrics[name]) for metrics in fetched])) for name in fetched[0]}
        if self._timed < len(fetched) and self._first_step is not None:
            values["first_step_seconds"] = self._first_step
        if self._timed:
            seconds = (time.perf_counter() - self._began) / self._timed
            values |= {"step_seconds": seconds, "steps_per_second": 1 / seconds}
            values["data_wait"] = self._waited / (seconds * self._timed)
        self._done += len(fetched)
        self._pending = []
        self._restart()
        return values

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time that passes inside."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._began += time.perf_counter() - began


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

    def save(self, done: int, state: Any, interval: _Interval) -> None:
        """Save a state that is not saved yet.

        Raises:
          UserError: the loss or the state is not finite.
          ValueError: the step does not count itself.
        """
        if done == self._saved:
            return
        self.guard(interval.check)
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

    def guard(self, fetch: Callable[[], Any]) -> Any:
        """`fetch()`, with its `_NotFinite` told to the user."""
        try:
            return fetch()
        except _NotFinite as error:
            raise self._error(str(error)) from error

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
    finite = jax.device_get({path: _finite(array) for path, array in arrays.items()})
    return next((path for path in arrays if not finite[path]), None)


@contextlib.contextmanager
def _closing(iterator: Iterator[Any]) -> Iterator[Iterator[Any]]:
    """Close a generator, or a loader's iterator with its processes, when the run ends."""
    try:
        yield iterator
    finally:
        if hasattr(iterator, "close"):
            iterator.close()
