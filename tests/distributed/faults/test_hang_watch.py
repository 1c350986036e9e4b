import contextlib
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dit_video.core.errors import EXIT_TRY_AGAIN, UserError
from dit_video.distributed.faults.hang_watch import HangWatch
from dit_video.distributed.faults.progress import Phase, ProgressRecord
from dit_video.distributed.faults.timeouts import TimeoutConfig
from support.devices import HANG, PROGRAMS, make_environment, wait_until

LIMITS = TimeoutConfig(max_step=10.0, max_phase=100.0, max_idle=50.0)


def test_a_loop_hangs_if_it_finishes_no_step_in_time():
    progress = ProgressRecord()
    watch = HangWatch(LIMITS, progress=progress)
    assert not watch.find_hang(1e9)  # No steps are expected.
    with progress.run_loop():
        for _ in range(3):
            assert not watch.find_hang(9.0)
            progress.add_step()
        assert not watch.find_hang(9.0)
        assert watch.find_hang(2.0) == "no step was finished for 10 s"
    assert not watch.find_hang(1e9)


def test_twenty_median_steps_are_waited_for():
    progress = ProgressRecord()
    progress.step_seconds.extend([1.0, 3.0, 1000.0])
    watch = HangWatch(LIMITS, progress=progress)
    with progress.run_loop():
        assert not watch.find_hang(59.0)
        assert watch.find_hang(2.0) == "no step was finished for 60 s"


def test_the_time_of_a_step_is_without_phases_and_without_compilation():
    progress = ProgressRecord()
    with progress.run_loop():
        time.sleep(0.2)  # compilation
        progress.add_step()
        with progress.run_phase(Phase("save", None)):
            time.sleep(0.2)
        progress.add_step()
    (seconds,) = progress.step_seconds
    assert seconds < 0.1


def test_the_time_of_a_step_includes_what_comes_before_a_phase(monkeypatch):
    """A training writes its log after each step, which begins and ends a phase just before the step is counted."""
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    progress = ProgressRecord()
    with progress.run_loop():
        progress.add_step()
        now += 5.0
        with progress.run_phase(Phase("hook", None)):
            now += 100.0
            with progress.run_phase(Phase("write", None)):
                now += 100.0
        now += 1.0
        progress.add_step()
        with progress.run_phase(Phase("hook", None)):
            now += 100.0
            progress.add_step()  # a step of nobody's time
            now += 100.0
        now += 3.0
        progress.add_step()
    assert list(progress.step_seconds) == [6.0, 0.0, 3.0]


def test_a_short_phase_may_take_as_long_as_a_step():
    progress = ProgressRecord()
    watch = HangWatch(LIMITS, progress=progress)
    with progress.run_phase(Phase("hook", None, is_short=True)):
        assert not watch.find_hang(9.0)
        assert watch.find_hang(2.0) == "the phase hook has not ended for 10 s"


def test_a_run_of_several_processes_is_watched_outside_of_trainings():
    progress, num_run_changes = ProgressRecord(), 0
    watch = HangWatch(LIMITS, progress=progress, count_run_changes=lambda: num_run_changes)
    assert not watch.find_hang(49.0)
    num_run_changes += 1  # in another process
    assert not watch.find_hang(49.0)
    progress.add_progress()
    assert not watch.find_hang(49.0)
    with progress.run_counted_work():
        assert not watch.find_hang(9.0)
        progress.add_progress()
        assert not watch.find_hang(9.0)
        assert watch.find_hang(2.0) == "no progress was made for 10 s"
    assert not watch.find_hang(49.0)
    assert watch.find_hang(2.0) == "no progress was made for 50 s"


def test_a_single_process_is_watched_in_trainings_only():
    progress = ProgressRecord()
    watch = HangWatch(LIMITS, progress=progress)
    with progress.run_counted_work():
        assert not watch.find_hang(1e9)


def test_a_phase_hangs_after_its_own_time():
    progress = ProgressRecord()
    watch = HangWatch(LIMITS, progress=progress)
    with progress.run_loop():
        with progress.run_phase(Phase("save", None)):
            assert not watch.find_hang(99.0)
            with progress.run_phase(Phase("write", 10.0)):
                assert not watch.find_hang(0.5)
            assert watch.find_hang(1.0) == "the phase save has not ended for 100 s"
        with progress.run_phase(Phase("encode", float("inf"))):
            assert not watch.find_hang(1e9)
        with progress.run_phase(Phase("sample", 10.0)):
            assert watch.find_hang(11.0) == "the phase sample has not ended for 10 s"
        assert not watch.find_hang(9.0)


def test_a_process_that_waits_for_the_phase_of_another_does_not_hang():
    progress, is_other_busy = ProgressRecord(), True
    watch = HangWatch(LIMITS, progress=progress, is_waiting=lambda: is_other_busy)
    with progress.run_loop():
        assert not watch.find_hang(1e9)
        is_other_busy = False
        assert not watch.find_hang(9.0)
        assert watch.find_hang(2.0)


def test_limits_below_a_second_are_refused():
    with pytest.raises(UserError, match=r"max_step=0\.5 is invalid: .* Use max_step=1"):
        TimeoutConfig(max_step=0.5)


def run_alone(case):
    """Run a case of the program and return its exit code and errors."""
    command = [sys.executable, str(PROGRAMS / "hanging_process.py"), case]
    environment = make_environment(1) | {"NUM_PROCESSES": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=HANG)
    return done.returncode, done.stderr


def test_a_single_process_that_hangs_in_compiled_code_ends_with_its_stacks():
    code, err = run_alone("step")
    assert code == EXIT_TRY_AGAIN, err
    assert "error: this process hangs: no step was finished for 1 s" in err
    assert "in sleep_in_step" in err


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="uses a timer of Linux")
def test_a_process_that_hangs_without_running_python_ends_with_its_stacks():
    code, err = run_alone("lock")
    assert code == EXIT_TRY_AGAIN, err
    assert "error: this process hangs: no Python code could run in it for 1" in err
    assert "in sleep_with_lock" in err


@pytest.mark.slow
def test_a_phase_longer_than_a_step_may_take_does_not_end_the_process():
    assert run_alone("phase") == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize("case", ["work", pytest.param("save", marks=pytest.mark.nightly)])
def test_a_process_that_was_suspended_for_much_longer_than_its_limits_goes_on(case):
    command = [sys.executable, str(PROGRAMS / "hanging_process.py"), case]
    environment = make_environment(1) | {"NUM_PROCESSES": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "working\n"
    time.sleep(0.5)
    process.send_signal(signal.SIGSTOP)
    time.sleep(25)
    process.send_signal(signal.SIGCONT)
    _, err = process.communicate(timeout=HANG)
    assert (process.returncode, err) == (0, "")


def is_running(process_id: str) -> bool:
    """Return True unless a process has ended, though nobody may have asked for its code."""
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="uses functions of Linux's C library")
def test_the_watchdog_ends_with_its_process():
    command = [sys.executable, str(PROGRAMS / "hanging_process.py"), "step"]
    environment = make_environment(1) | {"NUM_PROCESSES": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    watchdogs: list[str] = []

    def find_watchdog() -> bool:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{process.pid}/task").iterdir():
                watchdogs.extend((task / "children").read_text().split())
        return bool(watchdogs)

    wait_until(find_watchdog)
    process.kill()
    process.communicate(timeout=HANG)
    wait_until(lambda: not any(map(is_running, watchdogs)))
