"""Output of a run: the metrics log, and a progress bar with the estimated time left."""

import contextlib
import html
import io
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO, cast

import jax
import numpy as np
from jaxtyping import Array

from dit_video.core.errors import MissingError, UserError, raise_if_interrupted
from dit_video.core.files import write_text
from dit_video.core.typing import AnyArray
from dit_video.distributed.faults.progress import declare_phase
from dit_video.training import goodput
from dit_video.training.hooks.hook import Hook
from dit_video.training.step import Average, Metrics
from dit_video.training.time_recorder import TimeRecorder

_MAX_QUEUED_STEPS = 2
"""Number of steps that may be queued on the device behind the one whose result is awaited."""
_MAX_COMPILE_SECONDS = 3600.0
"""Time that the compilation of a step may take; that of large models takes tens of minutes."""


class NonFiniteLossError(Exception):
    """Raised if the loss is not finite at a step that was not skipped."""


class TooManySkipsError(Exception):
    """Raised if too many consecutive steps were skipped."""


class MetricAccumulator:
    """Accumulator of the metrics and the time of the steps since the last entry of the log.

    Metrics stay on the device until they are needed, so that the host runs ahead of it.
    """

    def __init__(
        self,
        steps_done: int,
        *,
        max_consecutive_skips: int,
        hooks: Sequence[Hook] = (),
        recorder: TimeRecorder | None = None,
    ) -> None:
        """Initialize the accumulator.

        Args:
          steps_done: Number of steps done so far.
          max_consecutive_skips: Number of consecutive skipped steps that is an error.
          hooks: Hooks that are told of skipped steps. Their identification of a batch is kept until its step is known
            not to be skipped.
          recorder: Recorder of where the time of the run goes.
        """
        self.recorder = TimeRecorder() if recorder is None else recorder
        self._steps_done = steps_done
        """Number of steps before those with pending metrics."""
        self._pending_metrics: list[Metrics] = []
        self._batch_ids: list[list[Mapping[str, AnyArray]]] = []
        """Identifications of the batches of pending metrics, by each hook."""
        self._num_checked = 0
        """Number of pending metrics that were checked for skipped steps."""
        self._consecutive_skips, self._max_consecutive_skips = 0, max_consecutive_skips
        self._hooks = hooks
        self._newest_loss: Array | None = None
        self._has_batch = False
        self._first_step_seconds: float | None = None
        self._compiled_shapes: set[tuple[Any, ...]] = set()
        self._untimed_steps_left = 0
        self.is_timed = False
        """True if the host spent the time since the step before the newest one on that of a step. It did not if the
        newest step or one of the two before was the first with its shapes, which compiles it: meanwhile the device
        empties its queue, which is then filled without waiting."""
        self._restart_interval()
        self._restart_timer()

    def _restart_interval(self) -> None:
        self._interval_start = time.perf_counter()
        self._lost_seconds: dict[str, float] = {}

    def _add_lost_seconds(self, name: str, seconds: float) -> None:
        self._lost_seconds[name] = self._lost_seconds.get(name, 0.0) + seconds

    def _restart_timer(self) -> None:
        self._start_time = time.perf_counter()
        self._num_timed = 0
        self._wait_seconds = 0.0
        self._device_seconds = 0.0
        """Seconds in which the host started steps and waited for devices, and did nothing of its own."""

    @property
    def _is_device_idle(self) -> bool:
        return self._newest_loss is None or self._newest_loss.is_ready()  # type: ignore[attr-defined]  # missing in JAX's stub

    def next(self, iterator: Iterator[Any], should_stop: Callable[[], bool]) -> Any:
        """Return the next batch, or None if a signal to stop has also ended the data loader's processes.

        Raises:
          UserError: The data ended before the training.
        """
        self.recorder.charge(goodput.STEP)
        start_time = time.perf_counter()
        try:
            batch = next(iterator)
        except Exception as error:
            if should_stop():
                return None
            if isinstance(error, StopIteration):
                step = self._steps_done + len(self._pending_metrics)
                raise UserError(f"the data ended after step {step}. Repeat them, or train for {step} steps.") from error
            raise
        if not self._has_batch:
            self._has_batch = True
            self._add_lost_seconds("first_batch", time.perf_counter() - start_time)
        # The wait is counted only if the device has finished its queued work and is idle.
        is_idle = self._is_device_idle
        self.recorder.charge(goodput.DATA if is_idle else goodput.STEP)
        if is_idle and self._newest_loss is not None:
            self._wait_seconds += time.perf_counter() - start_time
        return batch

    def add(self, batch: Any, metrics: Metrics) -> None:
        """Add the metrics of the step that was just started, and wait for the one `_MAX_QUEUED_STEPS` before it.

        Raises:
          TooManySkipsError: as many steps in a row as may be.
        """
        self._record_shapes(batch)
        self._pending_metrics.append(metrics)
        self._batch_ids.append([hook.identify(batch) for hook in self._hooks])
        self._newest_loss = metrics["loss"]  # type: ignore[assignment]  # a loss is no ratio
        assert isinstance(self._newest_loss, jax.Array)
        if self._first_step_seconds is None:  # the first step includes compilation, so it is timed separately
            self._newest_loss.block_until_ready()
            self._first_step_seconds = time.perf_counter() - self._start_time
            self._check_skips(len(self._pending_metrics))
            self._restart_timer()
            return
        self._num_timed += 1
        if len(self._pending_metrics) > _MAX_QUEUED_STEPS:
            start_time = time.perf_counter()
            jax.block_until_ready(self._pending_metrics[-1 - _MAX_QUEUED_STEPS]["loss"])
            self._device_seconds += time.perf_counter() - start_time
            self._check_skips(len(self._pending_metrics) - _MAX_QUEUED_STEPS)

    @contextlib.contextmanager
    def time_compilation(self, batch: Any) -> Iterator[None]:
        """Count the time inside the context, in which a step is started, as compilation if its shapes are new."""
        self.recorder.charge(goodput.STEP)
        start_time = time.perf_counter()
        is_new = _get_shapes(batch) not in self._compiled_shapes
        with declare_phase("compile", max_seconds=_MAX_COMPILE_SECONDS) if is_new else contextlib.nullcontext():
            yield
        seconds = time.perf_counter() - start_time
        self._device_seconds += seconds
        if is_new:
            self.recorder.charge(goodput.COMPILE)
            self._add_lost_seconds("compile", seconds)

    def _record_shapes(self, batch: Any) -> None:
        """Set `is_timed` for the step of this batch."""
        shapes = _get_shapes(batch)
        if shapes not in self._compiled_shapes:
            self._compiled_shapes.add(shapes)
            self._untimed_steps_left = 1 + _MAX_QUEUED_STEPS
        self.is_timed = self._untimed_steps_left == 0
        self._untimed_steps_left = max(0, self._untimed_steps_left - 1)

    def _check_skips(self, num_finished: int) -> None:
        """Check whether the first `number` pending steps, which have finished, were skipped."""
        for index in range(self._num_checked, num_finished):
            metrics = self._pending_metrics[index]
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

    def fetch_metrics(self) -> list[dict[str, Any]]:
        """Return the pending metrics as host arrays.

        Raises:
          NonFiniteLossError: The loss of a step that was not skipped is not finite.
          TooManySkipsError: Too many consecutive steps were skipped.
        """
        start_time = time.perf_counter()
        fetched = jax.device_get(self._pending_metrics)
        self._device_seconds += time.perf_counter() - start_time
        self._check_skips(len(fetched))
        for index, metrics in enumerate(fetched):
            if not np.isfinite(metrics["loss"]) and not metrics.get("skipped", 0):
                raise NonFiniteLossError(f"the loss is {float(metrics['loss'])} at step {self._steps_done + index + 1}")
        return fetched

    def compute_and_reset(self) -> dict[str, float]:
        """Return the entry of the log for the accumulated steps, and reset the accumulator.

        Means are over the steps that were not skipped; `skipped` is the number of those that were. An `Average` with
        count 0, such as the loss at times that no clip had, is left out.
        """
        fetched = self.fetch_metrics()
        values: dict[str, float] = {}
        for name in fetched[0]:
            mean = _mean([metrics[name] for metrics in fetched if not metrics.get("skipped", 0)])
            if mean is not None:
                values[name] = mean
        if "skipped" in fetched[0]:
            values["skipped"] = float(sum(metrics["skipped"] for metrics in fetched))
        if self._num_timed < len(fetched) and self._first_step_seconds is not None:
            values["first_step_seconds"] = self._first_step_seconds
        if self._num_timed:
            timed_seconds = time.perf_counter() - self._start_time
            seconds = timed_seconds / self._num_timed
            values |= {"step_seconds": seconds, "steps_per_second": 1 / seconds}
            values["data_wait"] = self._wait_seconds / timed_seconds
            values["host_seconds"] = max(0.0, timed_seconds - self._device_seconds) / self._num_timed
        values["interval_seconds"] = time.perf_counter() - self._interval_start
        values |= {f"{name}_seconds": seconds for name, seconds in self._lost_seconds.items()}
        self._steps_done += len(fetched)
        self._pending_metrics, self._batch_ids, self._num_checked = [], [], 0
        self._restart_interval()
        self._restart_timer()
        return values

    @contextlib.contextmanager
    def pause_timer(self, name: str) -> Iterator[None]:
        """Exclude the time inside the context from the step time, and log it as `NAME_seconds`."""
        self.recorder.charge(goodput.STEP)
        start_time = time.perf_counter()
        try:
            # Logs and functions after each step are quick; where their disk is dead, no other process waits for hours.
            with declare_phase(name, is_short=name == "hook"):
                yield
        finally:
            # Devices that still work on a step are not kept from it.
            category = goodput.SAVE if name == "save" else f"{goodput.HOOK}{name}"
            self.recorder.charge(category if self._is_device_idle else goodput.STEP)
            seconds = time.perf_counter() - start_time
            self._start_time += seconds
            self._add_lost_seconds(name, seconds)

    @contextlib.contextmanager
    def sync_and_pause_timer(self, name: str) -> Iterator[None]:
        """Wait for all steps, then do as `pause_timer`."""
        start_time = time.perf_counter()
        jax.block_until_ready(self._newest_loss)
        self._device_seconds += time.perf_counter() - start_time
        with self.pause_timer(name):
            yield


def _get_shapes(batch: Any) -> tuple[Any, ...]:
    return tuple(getattr(leaf, "shape", None) for leaf in jax.tree.leaves(batch))


def _mean(metrics: list[Any]) -> float | None:
    """Return the mean over steps; None for an `Average` whose counts are all 0."""
    if metrics and isinstance(metrics[0], Average):
        total, count = (sum(np.float64(value) for value in values) for values in zip(*metrics, strict=True))
        return float(total / count) if count else None
    return float(np.mean([np.float64(metric) for metric in metrics])) if metrics else float("nan")


class MetricsLog(Hook):
    """Metrics as JSON lines, `{"step": 20, "loss": 0.5, …}`, in increasing order of steps."""

    first_process_only = True

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)

    def resume(self, step: int) -> None:
        """Remove the entries after `step`, which the run writes again, and a half-written last line."""
        if self.path.is_file():
            entries = [entry for entry in read_metrics(self.path) if entry["step"] <= step]
            write_text(self.path, "".join(_format_line(entry) for entry in entries))

    def write(self, step: int, values: Mapping[str, float | int]) -> None:
        """Append one entry. NaN and infinity are written as null, as JSON has neither."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_format_line({"step": step, **{name: float(value) for name, value in values.items()}}))


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Return the entries of a `MetricsLog`, without a half-written last line; null is read as NaN.

    Raises:
      MissingError: The file does not exist.
      UserError: A line before the last is not an entry.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingError(f"{path} does not exist. Use the metrics file of a run.")
    *complete_lines, _incomplete_line = path.read_bytes().split(b"\n")
    entries = []
    for number, line in enumerate(complete_lines, start=1):
        try:
            entry = json.loads(line)
            values = {name: math.nan if value is None else value for name, value in entry.items()}
            entries.append({**values, "step": int(entry["step"])})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} line {number} is not a metrics entry. Remove that line.") from error
    return entries


def _format_line(entry: Mapping[str, Any]) -> str:
    encoded = {name: value if math.isfinite(value) else None for name, value in entry.items()}
    return json.dumps(encoded) + "\n"


class Progress:
    """Progress of a run with its loss and the time left: a bar in a terminal or a notebook, otherwise lines on stderr.

    Use it as a context manager, and call `update` as often as convenient: it draws a few times a second at most.
    """

    def __init__(
        self,
        title: str,
        total: int,
        *,
        start: int = 0,
        unit: str = "step",
        line_seconds: float | int = 10,
        stream: io.TextIOBase | None = None,
        visible: bool = True,
    ) -> None:
        """Initialize the progress display.

        Args:
          title: Text at the beginning of the line.
          total: Number of steps at the end of the run.
          start: Number of steps that the run continues from.
          unit: Name of a step, such as "clip".
          line_seconds: Seconds between two lines if there is no bar.
          stream: Stream to write to instead of stderr, or of the output of a notebook's cell.
          visible: True to draw; in a run of several processes, only one of them should.
        """
        self.title, self.total, self.start, self.unit = title, total, start, unit
        # Type checkers see the standard streams as TextIO, which is not a TextIOBase.
        self._stream = cast(io.TextIOBase, sys.stderr) if stream is None else stream
        self._visible = visible
        self._is_in_notebook = visible and stream is None and _is_in_notebook()
        self._has_bar = self._is_in_notebook or (visible and self._stream.isatty())
        self._draw_seconds = 0.2 if self._has_bar else line_seconds
        self._bar: _NotebookBar | _TerminalBar | None = None
        self._last_draw_time = -math.inf
        self._step = self._last_drawn_step = start
        self._loss = math.nan
        self._last_update: tuple[int, float] | None = None
        self._timed_steps, self._timed_seconds = 0, 0.0

    def __enter__(self) -> "Progress":
        if self._is_in_notebook:
            self._bar = _NotebookBar(self.title, self.total, self.start)
        elif self._has_bar:
            self._bar = _TerminalBar(self.title, self.total, self.start, self._stream)
        return self

    def __exit__(self, *_: object) -> None:
        if self._step != self._last_drawn_step:
            self._draw(time.perf_counter())
        if self._bar is not None:
            self._bar.stop()

    @property
    def step(self) -> int:
        """Return the number of steps done."""
        return self._step

    def update(self, step: int, loss: float | None = None, *, is_timed: bool = True) -> None:
        """Set the number of steps done, from which the time left is estimated.

        The steps up to the first call never count for the estimate, as they include compilation.

        Args:
          step: Number of steps done.
          loss: Newest loss, which is shown until the next one is passed.
          is_timed: False if the time since the last call is not that of steps, because it includes compilation.

        Raises:
          KeyboardInterrupt: Ctrl-C was pressed in a script, and the code that ran meanwhile ignored it.
        """
        raise_if_interrupted()
        self._step = step
        if loss is not None:
            self._loss = loss
        now = time.perf_counter()
        if self._last_update is not None and is_timed:
            self._timed_steps += step - self._last_update[0]
            self._timed_seconds += now - self._last_update[1]
        self._last_update = (step, now)
        if now - self._last_draw_time >= self._draw_seconds or (step == self.total != self._last_drawn_step):
            self._draw(now)

    def _draw(self, now: float) -> None:
        self._last_draw_time, self._last_drawn_step = now, self._step
        if not self._visible:
            return
        loss = "" if math.isnan(self._loss) else f"loss {self._loss:.4f}"
        left = self._format_time_left()
        if self._bar is not None:
            self._bar.draw(self._step, loss, left)
        else:
            print(_format_progress(self.title, self._step, self.total, loss, left), file=self._stream, flush=True)

    def _format_time_left(self) -> str:
        """Return the mean speed of the timed steps and the time left at this speed; empty before there are any."""
        if not self._timed_steps:
            return ""
        seconds = self._timed_seconds / self._timed_steps
        speed = f"{1 / seconds:.1f} {self.unit}s/s" if seconds < 1 else f"{seconds:.1f} s/{self.unit}"
        return f"{speed} · {_format_duration(seconds * (self.total - self._step))} left"


class _TerminalBar:
    """A bar in a terminal, drawn by rich."""

    def __init__(self, title: str, total: int, start: int, stream: io.TextIOBase) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bar

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TextColumn("{task.fields[left]}"),
        )
        self._bar = Bar(*columns, console=Console(file=cast(TextIO, stream)), refresh_per_second=5)
        self._task = self._bar.add_task(title, total=total, completed=start, loss="", left="")
        self._bar.start()

    def draw(self, step: int, loss: str, left: str) -> None:
        self._bar.update(self._task, completed=step, loss=loss, left=left)

    def stop(self) -> None:
        self._bar.stop()


class _NotebookBar:
    """A bar in the output of a notebook's cell, which every drawing replaces; rich's bar would need ipywidgets."""

    def __init__(self, title: str, total: int, start: int) -> None:
        from IPython.display import display

        self._title, self._total = title, total
        self._handle: Any = display(self._make_outputs(start, "", ""), raw=True, display_id=True)

    def draw(self, step: int, loss: str, left: str) -> None:
        self._handle.update(self._make_outputs(step, loss, left), raw=True)

    def stop(self) -> None:
        """Leave the bar as it is."""

    def _make_outputs(self, step: int, loss: str, left: str) -> dict[str, str]:
        share = step / max(1, self._total)
        bar = (
            '<div style="display:inline-block;vertical-align:middle;width:240px;height:10px;margin-right:10px;'
            'border-radius:5px;overflow:hidden;background:#8884">'
            f'<div style="width:{share:.1%};height:100%;background:#0072B2"></div></div>'
        )
        text = _format_progress(self._title, step, self._total, loss, left)
        return {"text/plain": text, "text/html": f"<div>{bar}{html.escape(text)}</div>"}


def _is_in_notebook() -> bool:
    """Return whether a cell of a notebook runs this: only then IPython's shell belongs to a kernel."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


def _format_progress(title: str, step: int, total: int, loss: str, left: str) -> str:
    parts = [f"{title} {step}/{total} ({step / max(1, total):.0%})", loss, left]
    return " · ".join(part for part in parts if part)


def print_on_first_process(text: str) -> None:
    """Print a line on stderr, in the first process only."""
    if jax.process_index() == 0:
        print(text, file=sys.stderr)


def _format_duration(seconds: float) -> str:
    """Return a duration as 1:02:03, or 2:03 if it is shorter than an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
