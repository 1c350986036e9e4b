"""Recorder of where the time of a run goes: it gives every moment one category, and writes the records of its attempt.

Boundaries divide the time: `charge` gives the time since the previous boundary a category, so that the times
add up to what has passed whatever is measured between them. Inside an attempt the clock is monotonic; the time of day
is read once, at its start. `training.goodput` describes the records and sums them.
"""

import contextlib
import dataclasses
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator

import jax

from dit_video.core.errors import GracefulStop, UserError
from dit_video.core.platform.process_time import get_process_age
from dit_video.core.storage import StoragePathLike, to_storage_path, write_text
from dit_video.training import goodput
from dit_video.training.goodput import Attempt, SlowHost, TimeRecord

_WRITE_SECONDS = 5.0
"""Seconds between two writes of the records, by a thread of its own."""
_MIN_GAP = 1.0
"""Minimum number of seconds between two writes of that thread."""
_MAX_WRITE_SHARE = 0.01
"""Maximum share of the time for which that thread writes, such as to an address that is slow to answer."""
_MAX_RECORDS = 1000
"""Number of records of an attempt from which neighbours of its older half are merged."""


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
        folder: StoragePathLike | None = None,
        *,
        clock: Callable[[], int] = _read_clock,
        time_of_day: Callable[[], int] = _read_time_of_day,
    ) -> None:
        """Initialize the recorder.

        Args:
          folder: Folder or address of the records of all attempts, `RUN/goodput`; None to write nothing.
          clock: Monotonic clock in microseconds.
          time_of_day: Time of day in microseconds.
        """
        self._folder = None if folder is None else to_storage_path(folder)
        self._clock, self._time_of_day = clock, time_of_day
        self._lock = threading.RLock()
        self._write_lock = threading.RLock()
        self._phases: list[str] = []
        self._earlier: tuple[Attempt, ...] = ()
        self._attempt: Attempt | None = None
        self._records: list[TimeRecord] = []
        self._lines: list[str] = []
        """Lines of the records, which never change."""
        self._pending = Counter[str]()
        self._training, self._start_step, self._step = "", 0, 0
        self._start_of_training = 0
        """Step at which this process began the training."""
        self._boundary = 0
        """Clock at the newest boundary."""
        self._base_times = Counter[str]()
        """Times of the run up to the newest resume, including lost steps."""
        self._new_times = Counter[str]()
        self._writer: _Writer | None = None

    def set_folder(self, folder: StoragePathLike) -> None:
        """Set the folder of the records, unless there is one."""
        if self._folder is None:
            self._folder = to_storage_path(folder)

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
                self._pause(ending)

    def _begin(self, age: int) -> None:
        """Begin the attempt, or continue it after a pause, which was idle."""
        if self._attempt is not None:
            self._charge(goodput.IDLE)
        else:
            # Read before the storage is, which may take seconds.
            self._boundary, begin, number = self._clock() - age, self._time_of_day() - age, 1
            if self._folder is not None:
                try:
                    number += max((number for number, _ in goodput.list_attempt_files(self._folder)), default=0)
                    self._earlier = goodput.read_attempts(self._folder)
                except (UserError, OSError) as error:  # without a list, the number could be an earlier attempt's
                    print(f"the times of this attempt are not recorded: {error}", file=sys.stderr)
                    self._folder = None
            self._attempt = Attempt(
                number=number, begin=begin, host=socket.gethostname(), process_count=jax.process_count()
            )
            self._restart_sums()
        if self._folder is not None:
            self._writer = _Writer(self.flush)

    def _pause(self, ending: str) -> None:
        """Write the records, and end the thread that does."""
        with self._lock:
            self._close_record(self._step)
            self._training = ""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        self.flush(ending=ending)

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
            self._new_times[category] += passed

    def resume(self, training: str, step: int) -> None:
        """Begin to account for the steps of a training, or continue it after `step`."""
        if not self._phases:
            return
        with self._lock:
            self.charge()
            self._close_record(self._step)
            self._training, self._start_step, self._step = training, step, step
            self._start_of_training = step
            self._restart_sums()
        self._wake()

    def end_training(self, step: int) -> None:
        """Account for the steps up to the end of a training's loop, and for none from there on."""
        with self._lock:
            self._close_record(step)
            self._training = ""
        self._wake()

    def count_step(self, step: int) -> None:
        """Set the number of steps done."""
        self._step = step

    def cut(self, step: int) -> None:
        """End a record at a step that is finished: at entries of the log, and where a later attempt may resume."""
        with self._lock:
            self._close_record(step)
        self._wake()

    def note_slow_host(self, slow: SlowHost) -> None:
        """Record a process that is slower than the others."""
        with self._lock:
            if self._attempt is not None:
                self._attempt = dataclasses.replace(self._attempt, slow_hosts=(*self._attempt.slow_hosts, slow))
        self._wake()

    def compute_metrics(self) -> dict[str, float]:
        """Return the goodput and the badput up to the newest boundary; see `goodput.compute_metrics`.

        Outside of an attempt there are none.
        """
        if not self._phases:
            return {}
        with self._lock:
            return goodput.compute_metrics(self._base_times + self._new_times)

    def _restart_sums(self) -> None:
        """Sum the times of the run again, as a resume decides which steps are lost."""
        if self._attempt is not None:
            attempt = dataclasses.replace(self._attempt, records=(*self._records, self._make_pending_record()))
            self._base_times = Counter(goodput.summarize([*self._earlier, attempt]).microseconds)
            self._new_times.clear()

    def _make_pending_record(self) -> TimeRecord:
        times = {name: value for name, value in self._pending.items() if value}
        if not self._training:
            return TimeRecord(microseconds=times)
        return TimeRecord(
            microseconds=times,
            training=self._training,
            start_step=self._start_step,
            step=max(self._step, self._start_step),
        )

    def _close_record(self, step: int) -> None:
        """End the pending record, which is a part of the one before it if no step was taken."""
        self._step = step
        record = self._make_pending_record()
        last = self._records[-1] if self._records else None
        self._pending.clear()
        self._start_step = step
        if last is not None and last.training == record.training and record.step == record.start_step == last.step:
            self._records.pop()
            self._lines.pop()
            record = _merge(last, record)
        elif not record.microseconds and record.step == record.start_step:
            return
        self._records.append(record)
        self._lines.append(goodput.format_record(record))
        if len(self._records) > _MAX_RECORDS:
            self._records = merge_records(self._records)
            self._lines = [goodput.format_record(each) for each in self._records]

    def _wake(self) -> None:
        if self._writer is not None:
            self._writer.wake()

    def flush(self, *, ending: str = "") -> None:
        """Write all records up to now, with the time of the pending one. A failure is printed and changes nothing.

        Args:
          ending: How the attempt ends; empty while it goes on.
        """
        if self._folder is None or self._attempt is None:
            return
        with self._write_lock:  # or a thread could write an older state over a newer one
            with self._lock:
                attempt, lines, pending = self._attempt, list(self._lines), self._make_pending_record()
                if self._phases:  # only a later boundary decides on the category
                    category, passed = self._get_default_category(), self._clock() - self._boundary
                    times = Counter(pending.microseconds)
                    times[category] += passed
                    pending = dataclasses.replace(pending, microseconds=dict(times))
            if pending.microseconds or pending.training:
                lines.append(goodput.format_record(pending))
            lines += [goodput.format_slow_host(slow) for slow in attempt.slow_hosts]
            if ending:
                lines.append(goodput.format_ending(ending))
            with _report_failures():
                text = "".join([goodput.format_header(attempt), *lines])
                write_text(self._folder / f"{attempt.number:04}.jsonl", text)


def merge_records(records: list[TimeRecord]) -> list[TimeRecord]:
    """Return fewer records of the same times and steps: neighbours of the older half are merged.

    A resume from the middle of a record loses a share of its time, so that the newer half stays as it is.
    """
    half = len(records) // 2
    merged: list[TimeRecord] = []
    is_merged = False  # whether the last one has two records already
    for record in records[:half]:
        last = merged[-1] if merged and not is_merged else None
        is_merged = last is not None and last.training == record.training and last.step == record.start_step
        if last is not None and is_merged:
            merged[-1] = _merge(last, record)
        else:
            merged.append(record)
    return merged + records[half:]


def _merge(first: TimeRecord, second: TimeRecord) -> TimeRecord:
    times = Counter(first.microseconds)
    times.update(second.microseconds)
    return dataclasses.replace(first, microseconds=dict(times), step=second.step)


@contextlib.contextmanager
def _report_failures() -> Iterator[None]:
    """Print a failure of the storage: a training does not end because its times cannot be written."""
    try:
        yield
    except (UserError, OSError) as error:
        print(f"the times of this run cannot be recorded now: {error}", file=sys.stderr)


class _Writer:
    """A thread that writes at an interval, and soon after it was woken."""

    def __init__(self, write: Callable[[], None]) -> None:
        self._write = write
        self._woken, self._closed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="goodput", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        self._woken.set()

    def close(self) -> None:
        self._closed.set()
        self._woken.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closed.is_set():
            start_time = time.monotonic()
            self._write()
            seconds = time.monotonic() - start_time
            self._closed.wait(max(_MIN_GAP, seconds / _MAX_WRITE_SHARE))
            self._woken.wait(_WRITE_SECONDS)
            self._woken.clear()
