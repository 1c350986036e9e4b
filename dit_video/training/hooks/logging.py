"""Output of a run: the files of its metrics and skipped steps, and a progress bar with the estimated time left."""

import html
import io
import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO, cast

import jax
import numpy as np
from jax.experimental import multihost_utils

from dit_video.core.errors import MissingError, UserError, raise_if_interrupted
from dit_video.core.files import write_text
from dit_video.core.typing import AnyArray
from dit_video.tokens import PackedBatch
from dit_video.training.hooks.hook import Hook


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
      MissingError: If the file does not exist.
      UserError: If a line before the last is not an entry.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingError(f"{path} does not exist. Use the metrics file of a run.")
    entries = _read_entries(path)
    return [{name: math.nan if value is None else value for name, value in entry.items()} for entry in entries]


def _read_entries(path: Path) -> list[dict[str, Any]]:
    """Return the entries of a log of steps as JSON lines, without a half-written last line.

    Raises:
      UserError: If a line before the last is not an entry.
    """
    *complete_lines, _incomplete_line = path.read_bytes().split(b"\n")
    entries = []
    for number, line in enumerate(complete_lines, start=1):
        try:
            entry = json.loads(line)
            entries.append({**entry, "step": int(entry["step"])})
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} line {number} is not an entry of a step. Remove that line.") from error
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
          is_timed: False if the time since the last call includes compilation.

        Raises:
          KeyboardInterrupt: If Ctrl-C was pressed in a script, and the code that ran meanwhile ignored it.
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


class SkippedLog(Hook):
    """Log of skipped steps, lines `{"step": 20, "loss": "nan", "gradient_norm": "inf", "examples": [[5, 6], …], …}`."""

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)

    def resume(self, step: int) -> None:
        """Remove the entries after `step`, and a half-written last line."""
        if jax.process_index() == 0 and self.path.is_file():
            entries = [entry for entry in _read_entries(self.path) if entry["step"] <= step]
            write_text(self.path, "".join(json.dumps(entry) + "\n" for entry in entries))

    def identify(self, batch: Any) -> Mapping[str, AnyArray]:
        """Return the ranks in the data plan of the examples of packed rows, `[B G]`, and which of them are valid."""
        return {"examples": batch.examples, "valid": batch.valid} if isinstance(batch, PackedBatch) else {}

    def on_skip(self, step: int, metrics: Mapping[str, Any], batch_ids: Mapping[str, AnyArray]) -> None:
        """Append one entry; all processes call this, each with its part of the batch's arrays."""
        arrays = {name: _gather(array).tolist() for name, array in batch_ids.items()}
        if jax.process_index():
            return
        values = {name: float(metrics[name]) for name in ("loss", "gradient_norm") if name in metrics}
        # JSON represents neither NaN nor infinity.
        logged = {name: value if np.isfinite(value) else str(value) for name, value in values.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **logged, **arrays}) + "\n")


def _gather(array: AnyArray) -> np.ndarray:
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)
