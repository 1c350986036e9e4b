"""A process is dead only if the system says so."""

import os
import subprocess
import sys
import uuid
from dataclasses import replace
from pathlib import Path

import pytest

from dit_video.training.process_identity import ProcessIdentity


@pytest.fixture
def finished() -> ProcessIdentity:
    """Return the identity of a process of this machine that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return replace(ProcessIdentity.get_current(), pid=process.pid, start_time="5")


def hide(monkeypatch, error: type[OSError], name: str = "/stat") -> None:
    """Let files of `/proc` be absent or refused."""
    read_text = Path.read_text

    def refuse(path: Path, *arguments, **keywords) -> str:
        if str(path).startswith("/proc") and str(path).endswith(name):
            raise error
        return read_text(path, *arguments, **keywords)

    monkeypatch.setattr(Path, "read_text", refuse)


def test_processes_that_run_or_ended_are_known(finished):
    current = ProcessIdentity.get_current()
    assert current.is_visible
    assert not current.has_ended
    assert replace(current, start_time="1").has_ended  # its number is that of another process now
    assert finished.has_ended
    assert not replace(finished, namespace="pid:[1]").has_ended


@pytest.mark.parametrize("error", [PermissionError, FileNotFoundError])
def test_a_process_that_the_system_hides_has_not_ended(monkeypatch, finished, error):
    """`/proc` with `hidepid` refuses, or does not show, the processes of other users."""
    current = ProcessIdentity.get_current()
    hide(monkeypatch, error)
    assert not current.has_ended
    assert finished.has_ended

    def refuse(*_: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    assert not finished.has_ended


def test_machines_of_one_name_do_not_judge_each_others_processes(monkeypatch, finished):
    """Without Linux's number of the boot, that of a network card tells machines apart."""
    hide(monkeypatch, FileNotFoundError, "/boot_id")
    monkeypatch.setattr("socket.gethostname", lambda: "mac.local")
    monkeypatch.setattr(uuid, "getnode", lambda: 0x001122334455)
    mine = ProcessIdentity.get_current()
    assert mine.is_on_this_machine
    assert replace(finished, boot=mine.boot).has_ended
    monkeypatch.setattr(uuid, "getnode", lambda: 0x001122334466)
    assert not mine.is_on_this_machine
    assert not replace(finished, boot=mine.boot).has_ended
