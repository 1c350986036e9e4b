import time

import pytest

from dit_video.core.errors import EXIT_TRY_AGAIN
from dit_video.distributed.faults.health import HealthChecker, Heartbeat, ProcessExit
from dit_video.distributed.faults.timeouts import TimeoutConfig

LIMITS = TimeoutConfig(max_silence=1.0, max_lag=1.0)


def beat(number, step_count=0, **fields):
    return Heartbeat(beat=number, step_count=step_count, **fields).to_text()


def exit_text(error, code):
    return ProcessExit(error=error, code=code).to_text()


def check(checker, texts):
    checker.update(texts)
    return checker.check(beat=1)


def test_processes_that_send_heartbeats_at_the_same_step_are_healthy():
    checker = HealthChecker(["first", "second"], LIMITS)
    for number in range(3):
        health = check(checker, {"alive/0": beat(number), "alive/1": beat(number)})
        assert (health.failure, health.is_busy, health.all_left) == ("", False, False)
        time.sleep(0.5)


def test_a_silent_process_is_named():
    checker = HealthChecker(["first", "second"], LIMITS)
    check(checker, {"alive/0": beat(0), "alive/1": beat(0)})
    time.sleep(1.1)
    failure = check(checker, {"alive/0": beat(1), "alive/1": beat(0)}).failure
    assert failure == "second has sent no heartbeat for 1 s: dead, stopped, or cut off"


def test_the_progress_of_all_processes_is_added_up():
    checker = HealthChecker(["first", "second"], LIMITS)
    health = check(checker, {"alive/0": beat(0, changes=5), "alive/1": beat(0, changes=7)})
    assert health.changes == 12


def test_after_a_suspension_of_the_first_process_nobody_is_silent():
    checker = HealthChecker(["first", "second"], LIMITS)
    check(checker, {"alive/0": beat(0), "alive/1": beat(0)})
    time.sleep(1.1)
    checker.restart()
    assert not check(checker, {"alive/0": beat(0), "alive/1": beat(0)}).failure


def test_a_process_that_is_behind_is_named_unless_it_is_in_a_phase():
    for phase, failure in (("", "second has been behind the others for 1 s"), ("save", "")):
        checker = HealthChecker(["first", "second"], LIMITS)
        texts = {"alive/0": beat(0, 3), "alive/1": beat(0, 2, phase=phase)}
        check(checker, texts)
        time.sleep(1.1)
        health = check(checker, texts | {"alive/1": beat(1, 2, phase=phase)})
        assert health.failure == failure
        assert health.is_busy == bool(phase)


def test_the_error_of_a_process_ends_the_others_only_if_they_do_not_end_themselves(monkeypatch):
    checker = HealthChecker(["first", "second"], LIMITS)
    texts = {"alive/0": beat(0), "alive/1": beat(0), "left/1": exit_text("UserError: the disk is full", 2)}
    assert not check(checker, texts).failure
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 11)
    health = check(checker, texts)
    assert health.failure == "second has ended (UserError: the disk is full)"
    assert health.exit_code == 2
    health = check(checker, texts | {"left/0": exit_text("UserError: the disk is full", 2)})
    assert not health.failure
    assert health.all_left


@pytest.mark.parametrize("code", [1, 75, 130])
def test_only_the_mistake_of_a_user_keeps_the_others_from_another_start(code, monkeypatch):
    checker = HealthChecker(["first", "second"], LIMITS)
    texts = {"alive/0": beat(0), "alive/1": beat(0), "left/1": exit_text("OSError: the disk is full", code)}
    check(checker, texts)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 11)
    assert check(checker, texts).exit_code == EXIT_TRY_AGAIN


def test_a_hang_is_one_of_each_process_unless_their_steps_differ():
    for step_count, name in ((5, "each process"), (4, "second")):
        checker = HealthChecker(["first", "second"], LIMITS)
        texts = {"alive/0": beat(0, 5), "alive/1": beat(0, step_count, hang="no step was finished for 9 s")}
        health = check(checker, texts)
        assert health.failure == f"{name} hangs: no step was finished for 9 s"
        assert health.is_hang


def test_all_in_trouble_are_told_so():
    checker = HealthChecker(["first", "second"], LIMITS)
    assert not check(checker, {"trouble/0": ""}).all_in_trouble
    assert check(checker, {"trouble/0": "", "trouble/1": ""}).all_in_trouble
