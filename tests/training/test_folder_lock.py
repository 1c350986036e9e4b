import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fsspec.registry import _registry

from dit_video.core.errors import TransientError, UserError
from dit_video.core.storage import to_storage_path
from dit_video.training import folder_lock
from dit_video.training.folder_lock import check_locks, lock_folder
from dit_video.training.lease import LeaseConfig, LeaseRecord
from support import exclusive_bucket
from support.devices import HANG, PROGRAMS, make_environment, run_together, wait_until
from support.fake_gcs import serve
from support.shared_bucket import VARIABLE

FAST = LeaseConfig(renew_every=0.1, expires_after=1.0, settle=0.05)
HOST = socket.gethostname()


def start(program: str, *arguments: object, bucket: Path | None = None) -> subprocess.Popen:
    environment = make_environment(1) | {"PYTHONUNBUFFERED": ""} | ({VARIABLE: str(bucket)} if bucket else {})
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(
        [sys.executable, "-P", str(PROGRAMS / program), *map(str, arguments)], env=environment, **pipes
    )


@contextmanager
def hold_lock(folder: object, *options: str, lease: float = 1.0, **keywords: Any) -> Iterator[subprocess.Popen]:
    """Start a process that holds the lock of a folder and writes into `lines` beside it."""
    log = keywords.pop("log", os.devnull)
    process = start("locked_folder.py", folder, HANG, 0.1, lease, log, *options, **keywords)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n", process.communicate()[1]
        yield process
    finally:
        process.kill()
        process.communicate()


def write_lease(folder: Path, *, number: int = 1, **changes: object) -> Path:
    """Write the lease of a process on another machine."""
    holder = {"host": "node7", "pid": 12, "boot": "other", "namespace": "pid:[1]", "start_time": "345"}
    times = {"since": "2026-01-01 00:00:00", "expires_after": 1.0}
    fields = {**holder, **times, "id": "abc", "has_file_lock": True, "is_released": False, "renewals": 0, **changes}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".lease-{number:06d}"
    path.write_text(json.dumps(fields))
    return path


@contextmanager
def renew(path: Path, pause: threading.Event | None = None) -> Iterator[None]:
    """Renew a lease of another machine again and again, except while `pause` is set."""
    done = threading.Event()

    def rewrite() -> None:
        count = 0
        while not done.wait(0.05):
            if pause is not None and pause.is_set():
                continue
            count += 1
            path.write_text(json.dumps(json.loads(path.read_text()) | {"renewals": count}))

    thread = threading.Thread(target=rewrite)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def test_a_folder_in_use_names_who_uses_it_until_that_one_is_dead(tmp_path, capfd):
    with hold_lock(tmp_path / "run", lease=60.0) as other:
        where = f"is in use by process {other.pid} on {HOST} since 2"
        with pytest.raises(TransientError, match=where), lock_folder(tmp_path / "run", config=FAST):
            pass
        assert f"run is in use by process {other.pid} on {HOST}" in capfd.readouterr().err
        with lock_folder(tmp_path / "other"):
            pass
        other.send_signal(signal.SIGKILL)
        other.wait()
        began = time.monotonic()
        with lock_folder(tmp_path / "run"):
            assert time.monotonic() - began < 30  # at once, not after the lease
            with pytest.raises(TransientError, match=f"in use by process {os.getpid()}"), lock_folder(tmp_path / "run"):
                pass
    with lock_folder(tmp_path / "run"):
        pass


def test_a_second_start_ends_with_a_code_that_asks_for_another(tmp_path):
    with lock_folder(tmp_path, config=FAST):
        other = start("locked_folder.py", tmp_path, 0, 0.1, 1, os.devnull)
        _, err = other.communicate(timeout=HANG)
    assert other.returncode == 75
    lines = err.splitlines()
    assert lines[0].startswith(f"{tmp_path} is in use by process {os.getpid()} on {HOST}")
    assert lines[-1].startswith(f"error: {tmp_path} is in use by process {os.getpid()} on {HOST} since 2")


def test_a_process_whose_parent_has_not_noticed_its_end_is_dead(tmp_path):
    with hold_lock(tmp_path, "no-flock", lease=60.0) as other:
        other.send_signal(signal.SIGKILL)  # without `wait` it stays as a zombie
        began = time.monotonic()
        with lock_folder(tmp_path):
            assert time.monotonic() - began < 30


def test_the_lease_of_a_dead_machine_expires(tmp_path, capfd):
    write_lease(tmp_path, number=3)
    began = time.monotonic()
    with lock_folder(tmp_path, config=FAST):
        assert time.monotonic() - began >= 1.0  # the time that the other one has stated
        assert [path.name for path in tmp_path.iterdir() if path.name != ".lock"] == [".lease-000004"]
    lines = capfd.readouterr().err.splitlines()
    assert lines[0].startswith(
        f"{tmp_path} is in use by process 12 on node7 since 2026-01-01 00:00:00; waiting up to 1 s"
    )
    assert lines[1].startswith("process 12 on node7 since 2026-01-01 00:00:00 has not renewed its lock")


def test_a_lease_that_another_machine_renews_holds(tmp_path):
    path = write_lease(tmp_path)
    began = time.monotonic()
    error = "is in use by process 12 on node7 since 2026-01-01"
    with renew(path), pytest.raises(TransientError, match=error), lock_folder(tmp_path, config=FAST):
        pass
    assert time.monotonic() - began >= 1.0  # it might have been about to end
    path.write_text(json.dumps(json.loads(path.read_text()) | {"is_released": True}))
    began = time.monotonic()
    with lock_folder(tmp_path, config=FAST):
        assert time.monotonic() - began < 1.0


def test_a_predecessor_that_ends_is_followed(tmp_path):
    """A pod may be started again while its predecessor on another machine still ends."""
    path = write_lease(tmp_path, expires_after=60.0)

    def end() -> None:
        time.sleep(0.5)
        path.write_text(json.dumps(json.loads(path.read_text()) | {"is_released": True}))

    thread = threading.Thread(target=end)
    thread.start()
    with lock_folder(tmp_path, config=FAST):
        thread.join()


def test_the_lock_of_a_dead_client_of_a_network_disk_does_not_last(tmp_path):
    """A server keeps the lock of a machine that is gone; its lease is not renewed."""
    write_lease(tmp_path)
    with (tmp_path / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with lock_folder(tmp_path, config=FAST):
            pass
        with lock_folder(tmp_path, config=FAST):  # the lock stays on the server
            pass


def test_a_lock_of_a_version_without_leases_holds(tmp_path):
    with (tmp_path / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(TransientError, match="in use by another process"), lock_folder(tmp_path, config=FAST):
            pass


def test_a_container_of_this_machine_that_ended_does_not_hold_its_folder(tmp_path):
    """Its number means nothing here, but it had the lock of the operating system, which is free."""
    with lock_folder(tmp_path, config=FAST):
        boot = json.loads((tmp_path / ".lease-000001").read_text())["boot"]
    write_lease(tmp_path, number=2, boot=boot, expires_after=60.0)
    began = time.monotonic()
    with lock_folder(tmp_path, config=FAST):
        assert time.monotonic() - began < 30


@pytest.mark.parametrize("options", [(), ("no-flock",)])
def test_a_process_that_was_suspended_for_longer_than_its_lease_writes_no_more(tmp_path, options):
    log = tmp_path / "lines"
    with hold_lock(tmp_path / "run", *options, log=log) as other:
        wait_until(lambda: log.exists() and log.stat().st_size > 0)
        other.send_signal(signal.SIGSTOP)
        with lock_folder(tmp_path / "run", config=FAST):
            size = log.stat().st_size
            other.send_signal(signal.SIGCONT)
            out, err = other.communicate(timeout=HANG)
            assert (other.returncode, out) == (75, "end of the output")
            assert log.stat().st_size == size
            check_locks()
    assert f"was taken over by process {os.getpid()} on {HOST}" in err.splitlines()[-1]
    assert err.splitlines()[-1].startswith("error: ")


def test_a_suspension_that_nobody_used_does_not_end_a_process(tmp_path):
    log = tmp_path / "lines"
    with hold_lock(tmp_path / "run", log=log) as other:
        wait_until(lambda: log.exists() and log.stat().st_size > 0)
        other.send_signal(signal.SIGSTOP)
        time.sleep(1.5)
        size = log.stat().st_size
        other.send_signal(signal.SIGCONT)
        wait_until(lambda: log.stat().st_size > size + 100)
        assert other.poll() is None


def test_a_holder_whose_system_lock_is_held_has_not_ended(tmp_path, monkeypatch):
    """Whatever the table of processes seems to say."""
    with hold_lock(tmp_path) as other:
        monkeypatch.setattr("dit_video.training.lease.ProcessIdentity.has_ended", True)
        with (
            pytest.raises(TransientError, match=f"is in use by process {other.pid}"),
            lock_folder(tmp_path, config=FAST),
        ):
            pass


def test_storage_that_stalls_for_longer_than_the_lease_gives_nobody_the_folder(tmp_path, monkeypatch):
    """Neither the holder's renewals nor the looks of who waits come through for a while."""
    path, is_stalled, count = write_lease(tmp_path), threading.Event(), 0
    read = folder_lock.read_newest_lease

    def stall(folder: Path) -> LeaseRecord:
        nonlocal count
        count += 1
        if count == 2:
            is_stalled.set()
            time.sleep(0.2)
        record = read(folder)
        if count == 3:
            time.sleep(1.5)
            is_stalled.clear()
        return record

    monkeypatch.setattr(folder_lock, "read_newest_lease", stall)
    error = "is in use by process 12 on node7"
    with renew(path, pause=is_stalled), pytest.raises(TransientError, match=error), lock_folder(tmp_path, config=FAST):
        pass
    assert count > 3
    assert [each.name for each in tmp_path.glob(".lease-*")] == [path.name]


@pytest.mark.parametrize("address", ["memory://bucket/run", "gs://bucket/run"])
def test_an_address_is_locked(tmp_path, memory, monkeypatch, address):
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    monkeypatch.setitem(_registry, "gs", exclusive_bucket.ExclusiveBucket)
    with lock_folder(address, config=FAST):
        with pytest.raises(TransientError, match=f"{address} is in use by process {os.getpid()}"), lock_folder(address):
            pass
        time.sleep(0.3)
        check_locks()
    with lock_folder(to_storage_path(address), config=FAST):
        pass
    names = [path.name for path in to_storage_path(address).iterdir()]
    assert names == [".lease-000002"]


@pytest.mark.slow
def test_an_address_is_locked_for_other_processes(tmp_path):
    with hold_lock("gs://bucket/run", bucket=tmp_path) as other:
        contender = start("locked_folder.py", "gs://bucket/run", 0, 0.1, 1, os.devnull, bucket=tmp_path)
        _, err = contender.communicate(timeout=HANG)
        assert contender.returncode == 75
        assert f"error: gs://bucket/run is in use by process {other.pid}" in err
        other.send_signal(signal.SIGSTOP)
        contender = start("locked_folder.py", "gs://bucket/run", 0, 0.1, 1, os.devnull, bucket=tmp_path)
        out, err = contender.communicate(timeout=HANG)
        assert (contender.returncode, out) == (0, "held\n")
        other.send_signal(signal.SIGCONT)
        assert other.wait(HANG) == 75


@pytest.mark.slow
def test_the_processes_of_a_run_hold_one_lock_or_end_together(tmp_path):
    program = "lock_in_two_processes.py"
    for output in run_together(program, str(tmp_path / "run")):
        assert "held 1" in output.splitlines()
    with renew(write_lease(tmp_path / "other")):
        for output in run_together(program, str(tmp_path / "other")):
            line = next(line for line in output.splitlines() if line.startswith("error"))
            assert line.startswith("error TransientError 75 ")
            assert "is in use by process 12 on node7" in line
    (tmp_path / "file").write_text("")
    for output in run_together(program, str(tmp_path / "file" / "run")):
        line = next(line for line in output.splitlines() if line.startswith("error"))
        assert line.startswith("error UserError 2 ")
        assert "cannot be written (Not a directory)" in line


@pytest.mark.slow
def test_the_client_of_a_service_lets_one_of_two_have_a_folder(tmp_path):
    """Google's client creates a file on the condition that there is none."""
    pytest.importorskip("gcsfs")
    (tmp_path / "meeting").mkdir()
    with serve():
        processes = [
            start("contending_locks.py", own, other, tmp_path / "meeting", "gs://bucket/run", 10)
            for own, other in (("a", "b"), ("b", "a"))
        ]
        outputs = [process.communicate(timeout=HANG) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert sorted(int(line) for out, _ in outputs for line in out.split()) == list(range(10))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "options"),
    [pytest.param("disk", (), marks=pytest.mark.nightly), ("disk", ("no-flock",)), ("gs://bucket", ())],
)
def test_of_two_that_start_at_once_exactly_one_has_the_folder(tmp_path, place, options):
    """They compete fifty times: most folders are new, every tenth has the lease of a machine that is gone."""
    (tmp_path / "meeting").mkdir()
    parent = tmp_path / ("bucket" if "://" in place else place)
    for number in range(0, 50, 10):
        write_lease(parent / str(number))
    place = place if "://" in place else str(parent)
    processes = [
        start("contending_locks.py", own, other, tmp_path / "meeting", place, 50, *options, bucket=tmp_path)
        for own, other in (("a", "b"), ("b", "a"))
    ]
    outputs = [process.communicate(timeout=HANG) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    winners = [int(line) for out, _ in outputs for line in out.split()]
    assert sorted(winners) == list(range(50))


def test_a_folder_that_cannot_be_made_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=r"file/run cannot be written \(Not a directory\). Use a writable folder"),
        lock_folder(tmp_path / "file" / "run"),
    ):
        pass


def test_a_lease_that_ends_before_it_is_renewed_is_refused():
    with pytest.raises(UserError, match=r"expires_after=20.0 is invalid: it must be at least 30.0"):
        LeaseConfig(renew_every=10.0, expires_after=20.0)
