"""Recorder of where the time of a run goes: it gives every moment one category, and writes the records of its attempt.

Boundaries divide the time: `charge` gives the time since the previous boundary a category, so that the times
add up to what has passed whatever is measured between them. Inside an attempt the clock is monotonic; the time of day
is read once, at its start. `training.goodput` describes the records and sums them.
"""

import contextlib
import dataclasses
import json
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from dit_video.core.errors import GracefulStop, UserError
from dit_video.core.platform.process_time import get_process_age
from dit_video.training import goodput
from dit_video.training.goodput import Attempt, SlowHost, TimeRecord

_FLUSH_SECONDS = 10.0
"""Interval at which a thread writes the time that goes on: a killed process loses at most this much."""


def _read_clock() -> int:
    return time.monotonic_ns() // 1000


def _read_time_of_day() -> int:
    return time.time_ns() // 1000


class TimeRecorder:
    """Recorder of one attempt of a run.

    Without a folder nothing is written, as in all processes but the first. An attempt begins with the first phase, or
    with `attempt`, and pauses when the outermost of these ends; what then passes until the next one is idle.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        clock: Callable[[], int] = _read_clock,
        time_of_day: Callable[[], int] = _read_time_of_day,
    ) -> None:
        """Initialize the recorder.

        Args:
          folder: Folder of the records of all attempts, `RUN/goodput`; None to write nothing.
          clock: Monotonic clock in microseconds.
          time_of_day: Time of day in microseconds.
        """
        self.folder = folder
        self._clock, self._time_of_day = clock, time_of_day
        self._lock = threading.RLock()
        self._phases: list[str] = []
        self._earlier: tuple[Attempt, ...] = ()
        self._attempt: Attempt | None = None
        self._records: list[TimeRecord] = []
        self._pending = Counter[str]()
        self._training, self._start_step, self._step = "", 0, 0
        self._start_of_training = 0
        """Step at which this process began the training."""
        self._boundary = 0
        """Clock at the newest boundary."""
        self._times = Counter[str]()
        """Times of the run up to the newest boundary, with the steps that the newest resume has lost."""
        self._paused = threading.Event()

    @contextlib.contextmanager
    def attempt(self, *, from_process_start: bool = False) -> Iterator[None]:
        """Account for all time inside the context, as `startup` unless a phase is entered.

        Args:
          from_process_start: True for a script, whose attempt begins with its process.
        """
        age = round(1e6 * get_process_age()) if from_process_start else 0
        with self.phase(goodput.STARTUP, age=age):
            yield

    @contextlib.contextmanager
    def phase(self, category: str, *, age: int = 0) -> Iterator[None]:
        """Give the time inside the context a category, unless it is charged to another one.

        Args:
          category: Category of the time.
          age: Time before the context, in microseconds, that belongs to it if it begins the attempt.
        """
        with self._lock:
            if self._phases:
                self.charge()
            else:
                self._begin(age)
            self._phases.append(category)
        ending = "finished"
        try:
            yield
        except BaseException as error:
            is_stop = isinstance(error, KeyboardInterrupt)
            ending = "stopped" if isinstance(error, GracefulStop) else "interrupted" if is_stop else "failed"
            raise
        finally:
            with self._lock:
                self.charge()
                self._phases.pop()
                if not self._phases:
                    self._paused.set()
                    self.end_training(self._step)
                    self._append({"ending": ending})

    def _begin(self, age: int) -> None:
        """Begin the attempt, or continue it after a pause, which was idle."""
        if self._attempt is not None:
            self._charge(goodput.IDLE)
        else:
            # Read before the disk is, which may take seconds.
            self._boundary, begin = self._clock() - age, self._time_of_day() - age
            number = self._read_earlier()
            values = {"host": socket.gethostname(), "process_count": jax.process_count()}
            self._attempt = Attempt(number=number, begin=begin, **values)
            self._append(goodput.describe_attempt(self._attempt))
            self._sum_times()
        if self.folder is not None:
            self._paused = threading.Event()
            threading.Thread(target=self._flush_regularly, args=(self._paused,), name="goodput", daemon=True).start()

    def _read_earlier(self) -> int:
        """Read the earlier attempts, and return the number of this one."""
        if self.folder is None:
            return 1
        try:
            self._earlier = goodput.read_attempts(self.folder)
            return 1 + max((number for number, _ in goodput.list_attempt_files(self.folder)), default=0)
        except (UserError, OSError) as error:  # without a list, the number could be an earlier attempt's
            print(f"the times of this attempt are not recorded: {error}", file=sys.stderr)
            self.folder = None
            return 1

    def charge(self, category: str | None = None) -> None:
        """Give the time since the previous boundary a category: by default a step's in a training, else the phase's.

        Outside of an attempt nothing is done.
        """
        if self._phases:
            self._charge(category or self._get_default_category())

    def _get_default_category(self) -> str:
        if not self._training:
            return self._phases[-1]
        # A process that is killed before its first step has only prepared.
        return goodput.STEP if self._step > self._start_of_training else goodput.STARTUP

    def _charge(self, category: str) -> None:
        with self._lock:
            now = self._clock()
            passed, self._boundary = now - self._boundary, now
            self._pending[category] += passed
            self._times[category] += passed

    def resume(self, training: str, step: int) -> None:
        """Begin to account for the steps of a training, or continue it after `step`."""
        if not self._phases:
            return
        with self._lock:
            self.charge()
            self.cut(self._step)
            self._training, self._start_step, self._step = training, step, step
            self._start_of_training = step
            self._sum_times()

    def end_training(self, step: int) -> None:
        """Account for the steps up to the end of a training's loop, and for none from there on."""
        with self._lock:
            self.cut(step)
            self._training = ""

    def count_step(self, step: int) -> None:
        """Set the number of steps done."""
        self._step = step

    def cut(self, step: int) -> None:
        """End a record at a step that is finished: at entries of the log, and where a later attempt may resume."""
        with self._lock:
            self._step = step
            record = self._make_record(self._pending)
            self._pending.clear()
            self._start_step = step
            if record.microseconds or record.step > record.start_step:
                self._records.append(record)
                self._append(goodput.describe_record(record))

    def note_slow_host(self, slow: SlowHost) -> None:
        """Record a process that is slower than the others."""
        self._append({"slow_host": vars(slow)})

    def compute_metrics(self) -> dict[str, float]:
        """Return the goodput and the badput up to the newest boundary; see `goodput.compute_metrics`.

        Outside of an attempt there are none.
        """
        with self._lock:
            return goodput.compute_metrics(self._times) if self._phases else {}

    def _sum_times(self) -> None:
        """Sum the times of the run; a resume decides which steps are lost."""
        if self._attempt is not None:
            attempt = dataclasses.replace(self._attempt, records=(*self._records, self._make_record(self._pending)))
            self._times = Counter(goodput.summarize([*self._earlier, attempt]).microseconds)

    def _make_record(self, times: Counter[str]) -> TimeRecord:
        microseconds = {name: value for name, value in times.items() if value}
        if not self._training:
            return TimeRecord(microseconds=microseconds)
        step = max(self._step, self._start_step)
        return TimeRecord(microseconds=microseconds, training=self._training, start_step=self._start_step, step=step)

    def flush(self) -> None:
        """Write the time since the last record, which the next record replaces."""
        with self._lock:
            if not self._phases:
                return
            times = self._pending.copy()
            times[self._get_default_category()] += self._clock() - self._boundary  # a later boundary may decide else
            self._append({**goodput.describe_record(self._make_record(times)), "is_open": True})

    def _flush_regularly(self, paused: threading.Event) -> None:
        while not paused.wait(_FLUSH_SECONDS):
            self.flush()

    def _append(self, line: dict[str, Any]) -> None:
        """Write a line. A failure is printed and changes nothing: a training does not end because of its times."""
        if self.folder is None or self._attempt is None:
            return
        try:
            with self._lock:
                self.folder.mkdir(parents=True, exist_ok=True)
                with (self.folder / f"{self._attempt.number:04}.jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
        except OSError as error:
            print(f"the times of this run cannot be recorded now: {error}", file=sys.stderr)
