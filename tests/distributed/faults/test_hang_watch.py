import contextlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dit_video.core.errors import EXIT_TRY_AGAIN, UserError
from dit_video.distributed.faults.hang_watch import HangWatch
from dit_video.distributed.faults.progress import ProgressRecord, Work
from dit_video.distributed.faults.store import KeyValueStore
from dit_video.distributed.faults.timeouts import TimeoutConfig
from support.coordination import simulate_processes
from support.devices import HANG, PROGRAMS, make_environment, wait_until

LIMITS = TimeoutConfig(max_step=10.0, max_phase=100.0, max_idle=50.0)
LOOP = Work("step", "max_step")


def test_a_loop_hangs_if_it_finishes_no_step_in_time():
    progress = ProgressRecord()
    watch = HangWatch(LIMITS, progress=progress)
    assert not watch.find_hang(1e9)  # No steps are expected.
    with progress.do(LOOP):
        for _ in range(3):
            assert not watch.find_hang(9.0)
            progress.count()
        assert not watch.find_hang(9.0)
        assert watch.find_hang(2.0) == "no step was finished for 10 s"
    assert not watch.find_hang(1e9)


def test_a_phase_has_its_own_limit():
    progress = ProgressRecord()
    watch = HangWatch(LIMITS, progress=progress)
    with progress.do(LOOP):
        with progress.do(Work("save", "max_phase")):
            assert not watch.find_hang(99.0)
            with progress.do(Work("write", 10.0)):
                assert not watch.find_hang(9.0)
                assert watch.find_hang(2.0) == "the phase write has made no progress for 10 s"
            assert not watch.find_hang(99.0)
            assert watch.find_hang(2.0) == "the phase save has made no progress for 100 s"
        with progress.do(Work("encode", float("inf"))):
            assert not watch.find_hang(1e9)
        with progress.do(Work("hook", "max_step")):
            assert not watch.find_hang(9.0)
            assert watch.find_hang(2.0)
        assert not watch.find_hang(9.0)


def test_a_single_process_is_watched_in_trainings_and_phases_only():
    progress = ProgressRecord()
    watch = HangWatch(LIMITS, progress=progress)
    with progress.do(Work("progress", "max_step")):
        assert not watch.find_hang(1e9)
    with progress.do(Work("restore", "max_phase")):
        assert not watch.find_hang(99.0)
        assert watch.find_hang(2.0)


def write_progress(groups, changes, limit):
    """Write the progress of process 1, as its watch does."""
    KeyValueStore("run", groups[1]).write("progress/1", json.dumps([changes, limit]))


def test_a_run_of_several_processes_is_watched_outside_of_trainings():
    with simulate_processes(2) as groups:
        progress = ProgressRecord()
        watch = HangWatch(LIMITS, KeyValueStore("run", groups[0]), progress=progress)
        assert not watch.find_hang(49.0)
        write_progress(groups, 1, 50.0)
        assert not watch.find_hang(49.0)  # The other one goes on.
        assert not watch.find_hang(49.0)
        progress.count()
        assert not watch.find_hang(49.0)
        write_progress(groups, 2, 10.0)
        with progress.do(Work("progress", "max_step")):
            assert not watch.find_hang(9.0)
            assert not watch.find_hang(9.0)
            assert watch.find_hang(2.0) == "no progress was made for 10 s"
        assert not watch.find_hang(49.0)
        assert watch.find_hang(2.0) == "no progress was made for 50 s"


def test_a_process_that_waits_for_the_phase_of_another_does_not_hang():
    with simulate_processes(2) as groups:
        progress = ProgressRecord()
        watch = HangWatch(LIMITS, KeyValueStore("run", groups[0]), progress=progress)
        write_progress(groups, 1, 100.0)
        with progress.do(LOOP):
            assert not watch.find_hang(11.0)
            assert not watch.find_hang(99.0)
            assert watch.find_hang(2.0) == "no step was finished for 100 s"


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
@pytest.mark.skipif(sys.platform != "linux", reason="reads the states of processes as Linux tells them")
def test_a_process_that_hangs_without_running_python_is_killed_with_its_stacks():
    code, err = run_alone("lock")
    assert code == -signal.SIGKILL, err
    assert "error: this process hangs: no Python code could run in it for 20 s" in err
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
@pytest.mark.skipif(sys.platform != "linux", reason="reads the states of processes as Linux tells them")
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
