import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dit_video.core.errors import UserError
from dit_video.training.folder_lock import lock_folder
from support.devices import HANG, PROGRAMS

ROOT = Path(__file__).parents[2]


def hold_lock(folder: Path, seconds: float) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-P", str(PROGRAMS / "locked_folder.py"), str(folder), str(seconds)]
    return subprocess.Popen(command, env=environment, **pipes)


def test_a_folder_in_use_names_who_uses_it_until_that_one_is_dead(tmp_path):
    other = hold_lock(tmp_path / "run", HANG)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        where = f"is in use by process {other.pid} on {socket.gethostname()} since 2"
        with pytest.raises(UserError, match=where), lock_folder(tmp_path / "run"):
            pass
        with lock_folder(tmp_path / "other"):
            pass
        other.send_signal(signal.SIGKILL)
        other.wait()
        with lock_folder(tmp_path / "run"):
            with pytest.raises(UserError, match=f"in use by process {os.getpid()}"), lock_folder(tmp_path / "run"):
                pass
            third = hold_lock(tmp_path / "run", 0)
            _, err = third.communicate(timeout=HANG)
        assert third.returncode == 2
        assert err.startswith(f"error: {tmp_path / 'run'} is in use by process {os.getpid()} on")
        assert len(err.splitlines()) == 1
        with lock_folder(tmp_path / "run"):
            pass
    finally:
        other.kill()


def test_a_file_system_without_locks_gives_a_warning(tmp_path, monkeypatch):
    def none(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", none)
    with pytest.warns(UserWarning, match="No locks available.*no other process trains there"), lock_folder(tmp_path):
        pass


def test_a_folder_that_cannot_be_made_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=r"file/run cannot be written \(Not a directory\). Use a writable folder"),
        lock_folder(tmp_path / "file" / "run"),
    ):
        pass
