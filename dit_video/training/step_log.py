"""Entries of a training's log: the metrics of its steps, and where their time went.

An entry is the mean of the metrics over the steps since the previous entry (or since the start of this process), with
`step_seconds` and `steps_per_second` (excluding the first step, saving and hooks); `data_wait`, the share of the time
spent waiting for a batch while the device was idle (an upper bound: if the device became idle during a wait, the whole
wait counts); the device's memory, if it reports that; and once `first_step_seconds`, most of which is compilation.
Results of periodic calls are logged at their step, and hooks add metrics to each entry.

`interval_seconds` is the whole time since the previous entry, or since the start of this process's loop; its parts
besides steps are `first_batch_seconds` (once), `compile_seconds` (of the first step, and of each with new shapes; a
part of the steps' time), `save_seconds`, and for hooks `NAME_seconds`, such as `validate_seconds`. Saving and hooks
that follow an entry are in the next one. `unix_seconds` is the time of day of the entry; if it is later than the
interval explains, the run was not running, or steps were repeated.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from dit_video.core.typing import AnyArray
from dit_video.distributed.faults.progress import count_progress, declare_phase, expect_steps
from dit_video.training import goodput
from dit_video.training.hooks.hook import Hook
from dit_video.training.step import Average, Metrics
from dit_video.training.time_recorder import TimeRecorder

_MAX_QUEUED_STEPS = 2
"""Number of steps that may be queued on the device behind the one whose result is awaited."""
_MAX_COMPILE_SECONDS = 3600.0
"""Time that the compilation of a step may take; large models take tens of minutes."""


class NonFiniteLossError(Exception):
    """Raised if the loss is not finite at a step that was not skipped."""


class TooManySkipsError(Exception):
    """Raised if too many consecutive steps were skipped."""


class StepLog:
    """The metrics of the steps since the last entry of the log, from which the next entry is made.

    Metrics stay on the device until they are needed, so that the host runs ahead of it.
    """

    def __init__(
        self, steps_done: int, *, max_consecutive_skips: int, hooks: Sequence[Hook] = (), timer: "LoopTimer"
    ) -> None:
        """Initialize the log.

        Args:
          steps_done: Number of steps done so far.
          max_consecutive_skips: Number of consecutive skipped steps that is an error.
          hooks: Hooks that write the entries, and are told of skipped steps. What identifies a batch for them is kept
            until its step is known not to be skipped.
          timer: Timer of the loop.
        """
        self.entry: Mapping[str, float] = {}
        """Newest entry; empty before the first."""
        self._steps_done = steps_done
        """Number of steps before those with pending metrics."""
        self._pending: list[Metrics] = []
        self._batch_ids: list[list[Mapping[str, AnyArray]]] = []
        """What identifies the batches of pending metrics for each hook."""
        self._num_checked = 0
        """Number of pending metrics that were checked for skipped steps."""
        self._consecutive_skips, self._max_consecutive_skips = 0, max_consecutive_skips
        self._hooks, self._timer = hooks, timer

    @property
    def step(self) -> int:
        """Return the number of steps done."""
        return self._steps_done + len(self._pending)

    def add(self, batch: Any, metrics: Metrics) -> None:
        """Add the metrics of the step that was just started, and wait for the one `_MAX_QUEUED_STEPS` before it.

        Raises:
          TooManySkipsError: If too many consecutive steps were skipped.
        """
        self._pending.append(metrics)
        self._batch_ids.append([hook.identify(batch) for hook in self._hooks])
        is_first = self._timer.add_step(self.step, metrics["loss"])
        num_finished = 1 if is_first else len(self._pending) - _MAX_QUEUED_STEPS
        if num_finished > 0:
            with self._timer.wait_for_devices():
                jax.block_until_ready(self._pending[num_finished - 1]["loss"])
            self._check_skips(num_finished)

    def fetch_metrics(self) -> list[dict[str, Any]]:
        """Wait for all steps, and return the pending metrics as host arrays.

        Raises:
          NonFiniteLossError: If the loss of a step that was not skipped is not finite.
          TooManySkipsError: If too many consecutive steps were skipped.
        """
        with self._timer.wait_for_devices():
            fetched = jax.device_get(self._pending)
        self._check_skips(len(fetched))
        for step, metrics in enumerate(fetched, start=self._steps_done + 1):
            if not np.isfinite(metrics["loss"]) and not metrics.get("skipped", 0):
                raise NonFiniteLossError(f"the loss is {float(metrics['loss'])} at step {step}")
        self._timer.cut(self.step)
        return fetched

    def write(self, results: Mapping[str, float]) -> None:
        """Make the entry of the steps since the last one, with the results of periodic calls, and let hooks write it.

        Means are over the steps that were not skipped; `skipped` is the number of those that were. An `Average` with
        count 0, such as the loss at times that no clip had, is left out.

        Raises:
          NonFiniteLossError: If the loss of a step that was not skipped is not finite.
          TooManySkipsError: If too many consecutive steps were skipped.
        """
        fetched = self.fetch_metrics()
        entry: dict[str, float] = {}
        for name in fetched[0]:
            mean = _mean([metrics[name] for metrics in fetched if not metrics.get("skipped", 0)])
            if mean is not None:
                entry[name] = mean
        if "skipped" in fetched[0]:
            entry["skipped"] = float(sum(metrics["skipped"] for metrics in fetched))
        entry |= self._timer.make_entry()
        self._steps_done = self.step
        self._pending, self._batch_ids, self._num_checked = [], [], 0
        with self._timer.timed("hook"):
            entry |= {name: value for hook in self._hooks for name, value in hook.derive(entry).items()}
            entry |= {**results, **_get_device_memory(), "unix_seconds": time.time()}
            self.entry = entry
            for hook in self._hooks:
                hook.write(self.step, entry)

    def _check_skips(self, num_finished: int) -> None:
        """Check which of the first `num_finished` pending steps were skipped; they have finished."""
        for index in range(self._num_checked, num_finished):
            metrics = self._pending[index]
            self._num_checked = index + 1
            if "skipped" not in metrics or not np.asarray(metrics["skipped"]):
                self._consecutive_skips = 0
                continue
            self._consecutive_skips += 1
            step = self._steps_done + index + 1
            for hook, batch_ids in zip(self._hooks, self._batch_ids[index], strict=True):
                hook.on_skip(step, jax.device_get(metrics), batch_ids)
            if self._consecutive_skips >= self._max_consecutive_skips:
                first = step - self._consecutive_skips + 1
                steps = f"{self._consecutive_skips} consecutive steps, {first} to {step}"
                raise TooManySkipsError(f"the loss or the gradient was not finite at {steps}")


class LoopTimer:
    """Measures where a loop's time goes, for its log and for the recorder of the run, and sets limits for hangs.

    The batches, the step, and all that happens between steps are wrapped, so that the loop itself measures nothing.
    """

    def __init__(self, recorder: TimeRecorder | None = None) -> None:
        self._recorder = TimeRecorder() if recorder is None else recorder
        self._newest_loss: Array | None = None
        self._has_batch = False
        self._first_step_seconds: float | None = None
        self._compiled_shapes: set[tuple[Any, ...]] = set()
        self._untimed_steps_left = 0
        self.is_timed = False
        """True if the time since the step before the newest one was a step's. It was not if the
        newest step or one of the two before was the first with its shapes, which compiles it: meanwhile the device
        empties its queue, which is then filled without waiting."""
        self._num_steps = 0
        """Number of steps since the last entry."""
        self._restart_interval()
        self._restart_step_time()

    def _restart_interval(self) -> None:
        self._interval_start = time.perf_counter()
        self._lost_seconds: dict[str, float] = {}

    def _restart_step_time(self) -> None:
        self._start_time = time.perf_counter()
        self._num_timed = 0
        self._wait_seconds = 0.0
        self._device_seconds = 0.0
        """Seconds in which the host started steps and waited for devices, and did nothing of its own."""

    @contextlib.contextmanager
    def run_loop(self) -> Iterator[None]:
        """Count the time before the context as preparation, and the end of the context after the steps as a hook's."""
        self._recorder.charge(goodput.STARTUP)
        try:
            with expect_steps():
                yield
        finally:
            self._recorder.charge(f"{goodput.HOOK}hook")

    def end(self, step: int) -> None:
        """End the training: what follows belongs to no step."""
        self._recorder.end_training(step)

    def wrap_batches(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Yield the batches. The wait for one counts as lost if the device has finished its queued work meanwhile."""
        while True:
            self._recorder.charge(goodput.STEP)
            start_time = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            seconds = time.perf_counter() - start_time
            if not self._has_batch:
                self._has_batch = True
                self._add_lost_seconds("first_batch", seconds)
            is_idle = self._is_device_idle
            self._recorder.charge(goodput.DATA if is_idle else goodput.STEP)
            if is_idle and self._newest_loss is not None:
                self._wait_seconds += seconds
            yield batch

    def wrap_step(self, step: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        """Return the step, whose first call with each kind of shapes counts as compilation."""

        def timed_step(state: Any, batch: Any) -> Any:
            self._recorder.charge(goodput.STEP)
            start_time = time.perf_counter()
            shapes = tuple(getattr(leaf, "shape", None) for leaf in jax.tree.leaves(batch))
            is_new = shapes not in self._compiled_shapes
            with declare_phase("compile", _MAX_COMPILE_SECONDS) if is_new else contextlib.nullcontext():
                result = step(state, batch)
            seconds = time.perf_counter() - start_time
            self._device_seconds += seconds
            if is_new:
                self._compiled_shapes.add(shapes)
                self._untimed_steps_left = 1 + _MAX_QUEUED_STEPS
                self._recorder.charge(goodput.COMPILE)
                self._add_lost_seconds("compile", seconds)
            self.is_timed = self._untimed_steps_left == 0
            self._untimed_steps_left = max(0, self._untimed_steps_left - 1)
            return result

        return timed_step

    @contextlib.contextmanager
    def timed(self, name: str, *, wait: bool = False) -> Iterator[None]:
        """Exclude the time inside the context from the step time, and log it as `NAME_seconds`.

        It may take hours before it counts as hung; only logs and functions after each step, `hook`, are quick, so that
        the other processes do not wait for hours where the disk of one is dead.

        Args:
          name: "save", "hook", or the name of a hook that is called at an interval.
          wait: Whether all steps are finished first.
        """
        if wait:
            with self.wait_for_devices():
                jax.block_until_ready(self._newest_loss)
        self._recorder.charge(goodput.STEP)
        start_time = time.perf_counter()
        try:
            with declare_phase(name, "max_step" if name == "hook" else "max_phase"):
                yield
        finally:
            # Devices that still work on a step are not kept from it.
            category = goodput.SAVE if name == "save" else f"{goodput.HOOK}{name}"
            self._recorder.charge(category if self._is_device_idle else goodput.STEP)
            seconds = time.perf_counter() - start_time
            self._start_time += seconds
            self._add_lost_seconds(name, seconds)

    @contextlib.contextmanager
    def wait_for_devices(self) -> Iterator[None]:
        """Count the time inside the context as the devices', not as the host's."""
        start_time = time.perf_counter()
        yield
        self._device_seconds += time.perf_counter() - start_time

    def add_step(self, step: int, loss: Any) -> bool:
        """Count a step that was just started, and return whether it was the first, which is waited for."""
        self._recorder.count_step(step)
        count_progress()
        self._num_steps += 1
        self._newest_loss = loss
        if self._first_step_seconds is None:  # it includes compilation, so it is timed separately
            jax.block_until_ready(loss)
            self._first_step_seconds = time.perf_counter() - self._start_time
            self._restart_step_time()
            return True
        self._num_timed += 1
        return False

    def cut(self, step: int) -> None:
        """End a record of the run's time at a step that is finished."""
        self._recorder.charge(goodput.STEP)
        self._recorder.cut(step)

    def make_entry(self) -> dict[str, float]:
        """Return the times since the last entry, and begin to measure the next one's."""
        entry: dict[str, float] = {}
        if self._num_timed < self._num_steps and self._first_step_seconds is not None:
            entry["first_step_seconds"] = self._first_step_seconds
        if self._num_timed:
            timed_seconds = time.perf_counter() - self._start_time
            seconds = timed_seconds / self._num_timed
            entry |= {"step_seconds": seconds, "steps_per_second": 1 / seconds}
            entry["data_wait"] = self._wait_seconds / timed_seconds
            entry["host_seconds"] = max(0.0, timed_seconds - self._device_seconds) / self._num_timed
        entry["interval_seconds"] = time.perf_counter() - self._interval_start
        entry |= {f"{name}_seconds": seconds for name, seconds in self._lost_seconds.items()}
        self._num_steps = 0
        self._restart_interval()
        self._restart_step_time()
        return entry

    @property
    def _is_device_idle(self) -> bool:
        return self._newest_loss is None or self._newest_loss.is_ready()  # type: ignore[attr-defined]  # missing in JAX's stub

    def _add_lost_seconds(self, name: str, seconds: float) -> None:
        self._lost_seconds[name] = self._lost_seconds.get(name, 0.0) + seconds


def _mean(metrics: list[Any]) -> float | None:
    """Return the mean over steps; None for an `Average` whose counts are all 0."""
    if metrics and isinstance(metrics[0], Average):
        total, count = (sum(np.float64(value) for value in values) for values in zip(*metrics, strict=True))
        return float(total / count) if count else None
    return float(np.mean([np.float64(metric) for metric in metrics])) if metrics else float("nan")


def _get_device_memory() -> dict[str, float]:
    """Return current and peak bytes in use on this process's first device; empty if it has no statistics (CPUs)."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    names = {"bytes_in_use": "device_memory_bytes", "peak_bytes_in_use": "device_memory_peak_bytes"}
    return {name: float(statistics[key]) for key, name in names.items() if key in statistics}
