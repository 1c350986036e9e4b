"""What a run says of itself: a file of metrics, and progress with the time that is left."""

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

from dit_video.core.errors import MissingError, UserError, stop_if_interrupted
from dit_video.core.files import write_text


class MetricsLog:
    """Metrics as JSON lines, `{"step": 20, "loss": 0.5, …}`, in increasing order of steps."""

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self._whole = False

    def resume(self, step: int) -> None:
        """Cut the entries after `step` and a half-written last line: the run writes them again."""
        if self.path.is_file():
            entries = [entry for entry in read(self.path) if entry["step"] <= step]
            write_text(self.path, "".join(_line(entry) for entry in entries))
        self._whole = True

    def write(self, step: int, values: Mapping[str, float | int]) -> None:
        """Append one entry. JSON has no NaN or infinity: they are written as null."""
        if not self._whole:
            self._repair()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line({"step": step, **{name: float(value) for name, value in values.items()}}))

    def _repair(self) -> None:
        """Cut a half-written last line, so that the next entry starts on a line of its own."""
        if self.path.is_file():
            data = self.path.read_bytes()
            if data and not data.endswith(b"\n"):
                write_text(self.path, data[: data.rfind(b"\n") + 1].decode())
        self._whole = True


def read(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The entries of a `MetricsLog`, without a half-written last line; null comes back as NaN.

    Raises:
      MissingError: no such file.
      UserError: a line before the last is not an entry.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingError(f"no such file: {path}; give the metrics file of a run")
    *whole, _half = path.read_bytes().split(b"\n")
    entries = []
    for number, line in enumerate(whole, start=1):
        try:
            entry = json.loads(line)
            values = {name: math.nan if value is None else value for name, value in entry.items()}
            entries.append({**values, "step": int(entry["step"])})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} line {number} is not a metrics entry; remove that line") from error
    return entries


def _line(entry: Mapping[str, Any]) -> str:
    finite = {name: value if math.isfinite(value) else None for name, value in entry.items()}
    return json.dumps(finite) + "\n"


class Progress:
    """How far a run is, its loss and the time left, on stderr: a bar in a terminal, else a line now and then.

    Use as a context manager, and call `update` as often as is convenient: it draws a few times a second at most.
    """

    def __init__(
        self,
        title: str,
        total: int,
        *,
        start: int = 0,
        unit: str = "step",
        seconds: float | int = 10,
        stream: io.TextIOBase | None = None,
        shown: bool = True,
    ) -> None:
        """
        Args:
          total: the step that ends the run.
          start: the step that it continues from.
          unit: what a step is of, such as a clip.
          seconds: between two lines, where there is no terminal.
          stream: instead of stderr.
          shown: False for all but one of several processes.
        """
        self.title, self.total, self.start, self.unit = title, total, start, unit
        # To type checkers the standard streams are TextIO, which is no TextIOBase.
        self._stream = cast(io.TextIOBase, sys.stderr) if stream is None else stream
        self._visible = shown
        self._terminal = shown and self._stream.isatty()
        self._pause = 0.2 if self._terminal else seconds
        self._bar: Any = None
        self._drawn = -math.inf
        self._step = self._drawn_step = start
        self._loss = math.nan
        self._first: tuple[int, float] | None = None

    def __enter__(self) -> "Progress":
        if self._terminal:
            self._bar, self._task = _bar(self._stream, self.title, self.total, self.start)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._step != self._drawn_step:
            self._draw(time.perf_counter())
        if self._bar is not None:
            self._bar.stop()

    @property
    def step(self) -> int:
        """How many are done."""
        return self._step

    def update(self, step: int, loss: float | None = None) -> None:
        """Say that `step` steps are done; `loss` stays until the next one is given.

        Raises:
          KeyboardInterrupt: Ctrl-C was pressed in a script, and what ran meanwhile dropped it.
        """
        stop_if_interrupted()
        self._step = step
        if loss is not None:
            self._loss = loss
        now = time.perf_counter()
        if self._first is None:  # the first step compiles: it says nothing of the speed
            self._first = (step, now)
        if now - self._drawn >= self._pause or (step == self.total != self._drawn_step):
            self._draw(now)

    def _draw(self, now: float) -> None:
        self._drawn, self._drawn_step = now, self._step
        if not self._visible:
            return
        loss = "" if math.isnan(self._loss) else f"loss {self._loss:.4f}"
        if self._bar is not None:
            self._bar.update(self._task, completed=self._step, loss=loss, left=self._left(now))
            return
        share = self._step / self.total
        parts = [f"{self.title} {self._step}/{self.total} ({share:.0%})", loss, self._left(now)]
        print(" · ".join(part for part in parts if part), file=self._stream, flush=True)

    def _left(self, now: float) -> str:
        """The speed so far and the time that the rest takes at it."""
        if self._first is None or self._step <= self._first[0]:
            return ""
        seconds = (now - self._first[1]) / (self._step - self._first[0])
        speed = f"{1 / seconds:.1f} {self.unit}s/s" if seconds < 1 else f"{seconds:.1f} s/{self.unit}"
        return f"{speed} · {_duration(seconds * (self.total - self._step))} left"


def _bar(stream: io.TextIOBase, title: str, total: int, start: int) -> tuple[Any, Any]:
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
    bar = Bar(*columns, console=Console(file=cast(TextIO, stream)), refresh_per_second=5)
    return bar, bar.add_task(title, total=total, completed=start, loss="", left="")


def remark(text: str) -> None:
    """Say something on stderr, once for all processes."""
    if jax.process_index() == 0:
        print(text, file=sys.stderr)


def _duration(seconds: float) -> str:
    """1:02:03, or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
