"""The recorder gives all time that passes a category, whatever happens meanwhile, and what it writes says the same."""

import contextlib
import json
import random
import time

import pytest

from dit_video.core.errors import GracefulStop, UserError
from dit_video.training import goodput, time_recorder
from dit_video.training.goodput import COMPILE, DATA, IDLE, LOST, SAVE, STARTUP, STEP, read_attempts, summarize
from dit_video.training.time_recorder import TimeRecorder


class Clock:
    """A clock in microseconds that a test sets, with a time of day that may differ."""

    def __init__(self, now=10**9, *, day=10**15):
        self.now, self.day = now, day

    def pass_seconds(self, seconds):
        self.now += round(1e6 * seconds)
        self.day += round(1e6 * seconds)

    def make_recorder(self, folder):
        return TimeRecorder(folder, clock=lambda: self.now, time_of_day=lambda: self.day)


def read(folder):
    return summarize(read_attempts(folder))


@contextlib.contextmanager
def killed_attempt(recorder, folder):
    """Leave the records that the context has written, as if the process was killed at its end."""
    with recorder.attempt():
        yield
        recorder.flush()
        (path,) = folder.glob("[0-9]*.jsonl")  # not one that is being written
        text = path.read_text()
    path.write_text(text)


def train(recorder, clock, first, last, *, save_every=5):
    """Take steps of a second each, after a second of waiting for the first batch, and save for half a second."""
    recorder.resume("denoiser", first)
    clock.pass_seconds(1)
    recorder.charge(DATA)
    for step in range(first + 1, last + 1):
        clock.pass_seconds(1)
        recorder.charge(STEP)
        recorder.count_step(step)
        if step % save_every == 0:
            recorder.cut(step)
            clock.pass_seconds(0.5)
            recorder.charge(SAVE)


def test_a_run_that_ends_has_all_of_its_time(tmp_path):
    clock = Clock()
    recorder = clock.make_recorder(tmp_path)
    with recorder.attempt():
        clock.pass_seconds(7)
        with recorder.phase("stage/latents"):
            clock.pass_seconds(3)
        train(recorder, clock, 0, 10)
        recorder.end_training(10)
        with recorder.phase("evaluation"):
            clock.pass_seconds(4)
    times = read(tmp_path)
    expected = {STARTUP: 7, "stage/latents": 3, DATA: 1, STEP: 10, SAVE: 1, "evaluation": 4}
    assert times.microseconds == {name: 1e6 * seconds for name, seconds in expected.items()}
    assert times.kept_steps == 10
    assert times.attempts[0].attempt.ending == "finished"


def test_kills_and_stops_over_several_attempts_add_up_to_the_time_of_day(tmp_path):
    clock = Clock()
    start = clock.day
    killed = clock.make_recorder(tmp_path)
    with killed_attempt(killed, tmp_path):
        clock.pass_seconds(2)
        train(killed, clock, 0, 8)
        clock.pass_seconds(0.25)  # in step 9
    clock.pass_seconds(600)

    own = Clock(5, day=clock.day)  # another machine, whose clock began anew
    stopped = own.make_recorder(tmp_path)
    with contextlib.suppress(GracefulStop), stopped.attempt():
        own.pass_seconds(2)
        train(stopped, own, 5, 12)
        stopped.cut(12)
        own.pass_seconds(0.5)
        stopped.charge(SAVE)
        stopped.end_training(12)
        raise GracefulStop("SIGTERM")
    own.pass_seconds(60)

    last = own.make_recorder(tmp_path)
    with last.attempt():
        own.pass_seconds(2)
        train(last, own, 12, 20)
        last.end_training(20)
    times = read(tmp_path)
    assert times.total == own.day - start
    assert times.microseconds == {
        STARTUP: 6e6,
        DATA: 3e6,
        STEP: 20e6,
        LOST: 3.25e6,
        SAVE: (1 + 2 + 2) * 0.5e6,
        IDLE: 660e6,
    }
    assert (times.kept_steps, times.lost_steps) == (20, 3)
    assert [each.attempt.ending for each in times.attempts] == ["", "stopped", "finished"]
    # The log of the last attempt had the same.
    assert last.compute_metrics() == {}
    with last.attempt():
        assert last.compute_metrics()["goodput"] == pytest.approx(times.goodput)
        assert last.compute_metrics()["run_seconds"] == times.total / 1e6


def test_metrics_of_the_log_know_of_steps_that_were_lost(tmp_path):
    clock = Clock()
    killed = clock.make_recorder(tmp_path)
    with killed_attempt(killed, tmp_path):
        train(killed, clock, 0, 9)
        assert killed.compute_metrics()["goodput"] == 9 / 10.5  # with a wait of a second, and a save of half a one
    clock.pass_seconds(2.5)
    recorder = clock.make_recorder(tmp_path)
    with recorder.attempt():
        assert recorder.compute_metrics()["goodput"] == 9 / 13  # they are not lost before it is known where it resumes
        train(recorder, clock, 5, 6)
        metrics = recorder.compute_metrics()
    assert metrics["goodput"] == 6 / 15
    assert metrics["badput_restarts"] == (4 + 2.5) / 15
    assert metrics["run_seconds"] == 15


@pytest.mark.parametrize("seed", range(20))
def test_random_phases_and_boundaries_leave_no_moment_out(tmp_path, seed):
    numbers, clock = random.Random(seed), Clock()
    recorder = clock.make_recorder(tmp_path)
    start = clock.day

    def act(depth):
        for _ in range(numbers.randint(1, 6)):
            clock.now += (passed := numbers.randint(0, 10**6))
            clock.day += passed
            match numbers.randint(0, 6):
                case 0:
                    recorder.charge(numbers.choice([STEP, DATA, COMPILE, None]))
                case 1:
                    recorder.resume(numbers.choice("ab"), numbers.randint(0, 20))
                case 2:
                    recorder.cut(numbers.randint(20, 40))
                case 3:
                    recorder.end_training(numbers.randint(20, 40))
                case 4:
                    recorder.flush()
                case 5 if depth < 3:
                    with recorder.phase(f"stage/{depth}"):
                        act(depth + 1)

    with recorder.attempt():
        act(0)
    act(0)  # in a pause
    with recorder.phase("evaluation"):
        act(0)
    times = read(tmp_path)
    assert times.total == clock.day - start
    assert min(times.microseconds.values()) >= 0


def test_a_pause_is_idle_and_belongs_to_the_same_attempt(tmp_path):
    clock = Clock()
    recorder = clock.make_recorder(tmp_path)
    for name in ("stage/autoencoder", "stage/latents"):
        with recorder.phase(name):
            clock.pass_seconds(2)
        clock.pass_seconds(5)
    times = read(tmp_path)
    assert times.microseconds == {"stage/autoencoder": 2e6, "stage/latents": 2e6, IDLE: 5e6}
    assert len(times.attempts) == 1


def test_an_attempt_begins_with_its_process(tmp_path):
    recorder = TimeRecorder(tmp_path)
    before = time.time()
    with recorder.attempt(from_process_start=True):
        pass
    (attempt,) = read_attempts(tmp_path)
    assert attempt.begin / 1e6 < before - 0.2  # Python and its packages were loaded before
    assert attempt.end / 1e6 == pytest.approx(time.time(), abs=5)


def test_an_exception_is_recorded_as_the_end(tmp_path):
    for number, (error, ending) in enumerate(
        [(ValueError(), "failed"), (KeyboardInterrupt(), "interrupted"), (GracefulStop(), "stopped")]
    ):
        with pytest.raises(type(error)), TimeRecorder(tmp_path).attempt():
            raise error
        assert read_attempts(tmp_path)[number].ending == ending


def test_a_thread_writes_the_time_that_goes_on(tmp_path, monkeypatch):
    """A process that is killed in a long evaluation has most of it in its records."""
    monkeypatch.setattr(time_recorder, "_FLUSH_SECONDS", 0.1)
    recorder = TimeRecorder(tmp_path)
    with recorder.attempt():
        with recorder.phase("evaluation"):
            deadline = time.monotonic() + 60
            while read(tmp_path).microseconds.get("evaluation", 0) < 1e6:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        assert read_attempts(tmp_path)[0].ending == ""
    assert read_attempts(tmp_path)[0].ending == "finished"


def test_storage_that_fails_ends_no_training(tmp_path, capsys):
    (tmp_path / "goodput").write_text("a file, where a folder has to be")
    recorder = TimeRecorder(tmp_path / "goodput")
    with recorder.attempt():
        pass
    assert "the times of this run cannot be recorded now" in capsys.readouterr().err


def test_an_attempt_overwrites_no_other_when_these_cannot_be_listed(tmp_path, monkeypatch, capsys):
    with TimeRecorder(tmp_path).attempt():
        pass
    before = (tmp_path / "0001.jsonl").read_text()

    def fail(_folder):
        raise UserError("the storage does not answer")

    monkeypatch.setattr(goodput, "list_attempt_files", fail)
    with TimeRecorder(tmp_path).attempt():
        pass
    assert "not recorded: the storage does not answer" in capsys.readouterr().err
    assert [path.read_text() for path in tmp_path.iterdir()] == [before]


def test_without_a_folder_or_an_attempt_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with TimeRecorder().attempt():
        pass
    recorder = TimeRecorder(tmp_path / "goodput")
    recorder.charge(STEP)
    recorder.resume("denoiser", 5)
    recorder.cut(6)
    recorder.end_training(6)
    recorder.flush()
    assert recorder.compute_metrics() == {}
    assert list(tmp_path.iterdir()) == []


def test_accounting_for_a_step_takes_microseconds(tmp_path):
    recorder = TimeRecorder(tmp_path)
    with recorder.attempt():
        recorder.resume("denoiser", 0)
        start_time = time.perf_counter()
        for step in range(2000):
            for category in (STEP, DATA, STEP, STEP, "hook/hook"):
                recorder.charge(category)
            recorder.count_step(step)
        seconds = (time.perf_counter() - start_time) / 2000
        recorder.end_training(2000)
    assert seconds < 0.001 * 0.05 * 10  # a step of 50 ms may lose 0.1 %; ten times that on a busy machine


def test_lines_are_json(tmp_path):
    with TimeRecorder(tmp_path).attempt():
        pass
    lines = (tmp_path / "0001.jsonl").read_text().splitlines()
    assert set(json.loads(lines[0])) == {"attempt", "begin", "host", "processes"}
    assert json.loads(lines[-1]) == {"ending": "finished"}


def test_a_process_that_is_killed_before_its_first_step_has_only_prepared(tmp_path):
    clock = Clock()
    recorder = clock.make_recorder(tmp_path)
    with killed_attempt(recorder, tmp_path):
        recorder.resume("denoiser", 20)
        clock.pass_seconds(30)  # such as for a service that it logs to
    assert read(tmp_path).microseconds == {STARTUP: 30_000_000}
