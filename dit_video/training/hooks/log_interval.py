"""Accumulation of the metrics and times of steps between two entries of the log, and detection of skipped steps."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from dit_video.core.errors import UserError
from dit_video.core.typing import AnyArray
from dit_video.training.hooks.skipped_steps import SkippedLog
from dit_video.training.step import Figures, Ratio

_AHEAD = 2
"""Number of steps that may be queued on the device behind the one whose result is awaited."""

Identify = Callable[[Any], Mapping[str, AnyArray]]
"""Function from a batch to small arrays that identify it."""


class NotFinite(Exception):
    """Raised if the loss is not finite at a step that was not skipped."""


class TooManySkipped(Exception):
    """Raised if too many consecutive steps were skipped."""


class Interval:
    """Accumulator of the metrics and the time of the steps since the last entry of the log.

    Metrics stay on the device until they are needed, so that the host runs ahead of it.
    """

    def __init__(
        self, done: int, *, most: int, identify: Identify | None = None, skipped: SkippedLog | None = None
    ) -> None:
        """Initialize the accumulator.

        Args:
          steps_done: Number of steps done so far.
          max_consecutive_skips: Number of consecutive skipped steps that is an error.
          identify: Function that identifies a batch; its result is kept until the step is known not to be skipped.
          skipped_log: Log of skipped steps.
        """
        self._done = done
        """Number of steps before those with pending metrics."""
        self._pending: list[Figures] = []
        self._batches: list[Mapping[str, AnyArray]] = []
        self._looked = 0
        """Number of pending metrics that were checked for skipped steps."""
        self._in_a_row, self._most = 0, most
        self._identify, self._skipped = identify, skipped
        self._newest: Array | None = None
        self._first_step: float | None = None
        self._restart()

    def _restart(self) -> None:
        self._began = time.perf_counter()
        self._timed = 0
        self._waited = 0.0

    def next(self, iterator: Iterator[Any], stopped: Callable[[], bool]) -> Any:
        """Return the next batch, or None if a signal to stop has also ended the data loader's processes.

        Raises:
          UserError: The data ended before the training.
        """
        start_time = time.perf_counter()
        try:
            batch = next(iterator)
        except Exception as error:
            if stopped():
                return None
            if isinstance(error, StopIteration):
                step = self._done + len(self._pending)
                raise UserError(f"the data ended after step {step}. Repeat them, or train for {step} steps.") from error
            raise
        # The wait is counted only if the device has finished its queued work and is idle.
        if self._newest is not None and self._newest.is_ready():  # type: ignore[attr-defined]  # missing in JAX's stub
            self._waited += time.perf_counter() - start_time
        return batch

    def add(self, batch: Any, metrics: Figures) -> None:
        """Add the metrics of the step that was just started, and wait for the one `_MAX_QUEUED_STEPS` before it.

        Raises:
          TooManySkipped: as many steps in a row as may be.
        """
        self._pending.append(metrics)
        self._batches.append({} if self._identify is None else self._identify(batch))
        self._newest = metrics["loss"]  # type: ignore[assignment]  # a loss is no ratio
        assert isinstance(self._newest, jax.Array)
        if self._first_step is None:  # the first step includes compilation, so it is timed separately
            self._newest.block_until_ready()
            self._first_step = time.perf_counter() - self._began
            self._look(len(self._pending))
            self._restart()
            return
        self._timed += 1
        if len(self._pending) > _AHEAD:
            jax.block_until_ready(self._pending[-1 - _AHEAD]["loss"])
            self._look(len(self._pending) - _AHEAD)

    def _look(self, number: int) -> None:
        """Check whether the first `number` pending steps, which have finished, were skipped."""
        for index in range(self._looked, number):
            metrics = self._pending[index]
            self._looked = index + 1
            if "skipped" not in metrics or not np.asarray(metrics["skipped"]):
                self._in_a_row = 0
                continue
            self._in_a_row += 1
            step = self._done + index + 1
            if self._skipped is not None:
                self._skipped.write(step, jax.device_get(metrics), self._batches[index])
            if self._in_a_row >= self._most:
                first = step - self._in_a_row + 1
                raise TooManySkipped(
                    f"the loss or the gradient was not finite at {self._in_a_row} consecutive steps, {first} to {step}"
                )

    def check(self) -> list[dict[str, Any]]:
        """Return the pending metrics as host arrays.

        Raises:
          NonFiniteLossError: The loss of a step that was not skipped is not finite.
          TooManySkipsError: Too many consecutive steps were skipped.
        """
        fetched = jax.device_get(self._pending)
        self._look(len(fetched))
        for index, metrics in enumerate(fetched):
            if not np.isfinite(metrics["loss"]) and not metrics.get("skipped", 0):
                raise NotFinite(f"the loss is {float(metrics['loss'])} at step {self._done + index + 1}")
        return fetched

    def entry(self) -> dict[str, float]:
        """Return the entry of the log for the accumulated steps, and reset the accumulator.

        Means are over the steps that were not skipped; `skipped` is the number of those that were. An `Average` with
        count 0, such as the loss at times that no clip had, is left out.
        """
        fetched = self.check()
        values: dict[str, float] = {}
        for name in fetched[0]:
            mean = _mean([metrics[name] for metrics in fetched if not metrics.get("skipped", 0)])
            if mean is not None:
                values[name] = mean
        if "skipped" in fetched[0]:
            values["skipped"] = float(sum(metrics["skipped"] for metrics in fetched))
        if self._timed < len(fetched) and self._first_step is not None:
            values["first_step_seconds"] = self._first_step
        if self._timed:
            seconds = (time.perf_counter() - self._began) / self._timed
            values |= {"step_seconds": seconds, "steps_per_second": 1 / seconds}
            values["data_wait"] = self._waited / (seconds * self._timed)
        self._done += len(fetched)
        self._pending, self._batches, self._looked = [], [], 0
        self._restart()
        return values

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time inside the context from the step time."""
        start_time = time.perf_counter()
        try:
            yield
        finally:
            self._began += time.perf_counter() - start_time

    @contextlib.contextmanager
    def settled(self) -> Iterator[None]:
        """Wait for all steps, then exclude the time inside the context from the step time."""
        jax.block_until_ready(self._newest)
        with self.paused():
            yield


def _mean(figures: list[Any]) -> float | None:
    """Return the mean over steps; None for an `Average` whose counts are all 0."""
    if figures and isinstance(figures[0], Ratio):
        total, count = (sum(np.float64(value) for value in values) for values in zip(*figures, strict=True))
        return float(total / count) if count else None
    return float(np.mean([np.float64(metric) for metric in figures])) if figures else float("nan")
