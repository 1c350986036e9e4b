"""Locks of folders whose storage or whose other processes fail."""

import os
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from dit_video.core.errors import TransientError
from dit_video.training import folder_lock
from dit_video.training.folder_lock import check_locks, lock_folder
from dit_video.training.lease import Lease, LeaseConfig
from support.devices import HANG

FAST = LeaseConfig(renew_every=0.1, expires_after=1.0, settle=0.05)


def test_a_disk_that_does_not_answer_in_time_is_no_reason_to_write(tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(116, "Stale file handle")

    with lock_folder(tmp_path, config=FAST):
        with monkeypatch.context() as patch:
            patch.setattr("os.listdir", fail)
            time.sleep(1.2)
            with pytest.raises(TransientError, match=r"cannot be locked now \(Stale file handle"):
                check_locks()
        check_locks()


def test_a_lock_is_released_if_the_meeting_of_the_processes_fails(tmp_path, monkeypatch):
    def fail(_: str, function: Callable[[], None]) -> None:
        function()
        raise RuntimeError("the first process is gone")

    with monkeypatch.context() as patch:
        patch.setattr(folder_lock, "call_together", fail)
        with pytest.raises(RuntimeError, match="is gone"), lock_folder(tmp_path, config=FAST):
            pass
    began = time.monotonic()
    with lock_folder(tmp_path, config=FAST):
        assert time.monotonic() - began < 1.0


def test_the_end_does_not_wait_for_a_disk_that_hangs_and_says_once_that_renewals_fail(tmp_path, monkeypatch, capfd):
    answers, main_thread, listdir = threading.Event(), threading.current_thread(), os.listdir

    def hang(*arguments: Any) -> list[str]:
        if not answers.is_set() and threading.current_thread() is not main_thread:
            answers.wait(HANG)
        assert answers.is_set()  # the main thread does not even try
        return listdir(*arguments)

    def fail(*_: object) -> None:
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(folder_lock, "RELEASE_SECONDS", 0.3)
    with lock_folder(tmp_path, config=FAST), monkeypatch.context() as patch:
        patch.setattr("os.listdir", fail)
        time.sleep(0.5)
        patch.setattr("os.listdir", hang)
        time.sleep(0.2)
        began = time.monotonic()
    # The patch ends before the lock does: its thread hangs in a call that began earlier.
    assert 0.3 <= time.monotonic() - began < 10
    answers.set()
    assert capfd.readouterr().err.count("cannot be renewed now (OSError: [Errno 116] Stale file handle)") == 1


def test_a_process_that_was_not_first_waits_before_it_tries_again(tmp_path, monkeypatch):
    pauses: list[float] = []
    results = [None, None]
    try_create = Lease.try_create
    monkeypatch.setattr("time.sleep", pauses.append)
    monkeypatch.setattr(
        Lease, "try_create", lambda *arguments, **keywords: (results or [try_create(*arguments, **keywords)]).pop()
    )
    with lock_folder(tmp_path, config=FAST):
        assert len([pause for pause in pauses if pause == 0.025]) == 2
