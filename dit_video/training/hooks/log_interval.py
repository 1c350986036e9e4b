"""What the steps between two entries of the log were like: their metrics, their time, and which were skipped."""

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
"""How many steps may be queued on the device behind the one whose result is awaited."""

Identify = Callable[[Any], Mapping[str, AnyArray]]
"""From a batch to small arrays of it that say which one it was."""


class NotFinite(Exception):
    """The message says what is not finite, and at which step."""


class TooManySkipped(Exception):
    """The message says which steps in a row were skipped."""


class Interval:
    """Metrics and time of the steps since the last entry of the log."""

    def __init__(
        self, done: int, *, most: int, identify: Identify | None = None, skipped: SkippedLog | None = None
    ) -> None:
        """
        Args:
          done: steps done.
          most: of one another following steps that may be skipped.
          identify: whose result is kept for every step until it is known whether that was skipped.
          skipped: where skipped steps are written down.
        """
        self._done = done
        """the step that the first pending metrics follow"""
        self._pending: list[Figures] = []
        self._batches: list[Mapping[str, AnyArray]] = []
        self._looked = 0
        """at so many of the pending metrics, for whether their steps were skipped"""
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
        """The next batch; None where a signal to stop also ended the data (it reaches the loader's processes too)."""
        began = time.perf_counter()
        try:
            batch = next(iterator)
        except Exception as error:
            if stopped():
                return None
            if isinstance(error, StopIteration):
                step = self._done + len(self._pending)
                raise UserError(f"the data end after step {step}; repeat them, or train for {step} steps") from error
            raise
        if self._newest is not None and self._newest.is_ready():  # type: ignore[attr-defined]  # missing in JAX's stub
            self._waited += time.perf_counter() - began
        return batch

    def add(self, batch: Any, metrics: Figures) -> None:
        """Take the metrics of the step that was just started, and wait for the one that lies `_AHEAD` steps back.

        Raises:
          TooManySkipped: as many steps in a row as may be.
        """
        self._pending.append(metrics)
        self._batches.append({} if self._identify is None else self._identify(batch))
        self._newest = metrics["loss"]  # type: ignore[assignment]  # a loss is no ratio
        assert isinstance(self._newest, jax.Array)
        if self._first_step is None:  # it compiles, and is timed apart
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
        """At the first `number` pending steps, which are done: whether they were skipped."""
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
                    f"the loss or the gradient was not finite at {self._in_a_row} steps in a row, {first} to {step}"
                )

    def check(self) -> list[dict[str, Any]]:
        """The pending metrics, fetched.

        Raises:
          NotFinite: the loss of one of the steps is not, and the step was not skipped.
          TooManySkipped: as many steps in a row as may be.
        """
        fetched = jax.device_get(self._pending)
        self._look(len(fetched))
        for index, metrics in enumerate(fetched):
            if not np.isfinite(metrics["loss"]) and not metrics.get("skipped", 0):
                raise NotFinite(f"the loss is {float(metrics['loss'])} at step {self._done + index + 1}")
        return fetched

    def entry(self) -> dict[str, float]:
        """What the log says of these steps; a new interval begins.

        Means are over the steps that were not skipped; how many were is `skipped`. A ratio that is of nothing, such as
        the loss at times that no clip had, is left out.
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
        """Leave out the time that passes inside."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._began += time.perf_counter() - began

    @contextlib.contextmanager
    def settled(self) -> Iterator[None]:
        """Wait for all steps, then leave out the time that passes inside."""
        jax.block_until_ready(self._newest)
        with self.paused():
            yield


def _mean(figures: list[Any]) -> float | None:
    """Over steps; None of a ratio without anything."""
    if figures and isinstance(figures[0], Ratio):
        total, count = (sum(np.float64(part) for part in parts) for parts in zip(*figures, strict=True))
        return float(total / count) if count else None
    return float(np.mean([np.float64(figure) for figure in figures])) if figures else float("nan")
