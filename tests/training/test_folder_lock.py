import errno
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
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
from fsspec.registry import _registry

from dit_video.core.errors import TransientError, UserError
from dit_video.core.storage import to_storage_path
from dit_video.training import folder_lock
from dit_video.training.folder_lock import LEASE_FILE, LOCK_FILE, LeaseConfig, check_locks, lock_folder
from support import exclusive_bucket
from support.devices import HANG, PROGRAMS, make_environment, run_together, wait_until
from support.fake_gcs import serve
from support.marks import mark_nightly_except
from support.shared_bucket import VARIABLE

FAST = LeaseConfig(renew_every=0.2, expires_after=2.0)
HOST = socket.gethostname()


def start(program: str, *arguments: object, bucket: Path | None = None) -> subprocess.Popen:
    environment = make_environment(1) | {"PYTHONUNBUFFERED": ""} | ({VARIABLE: str(bucket)} if bucket else {})
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(
        [sys.executable, "-P", str(PROGRAMS / program), *map(str, arguments)], env=environment, **pipes
    )


@contextmanager
def hold_lock(folder: object, *options: str, **keywords: Any) -> Iterator[subprocess.Popen]:
    """Start a process that holds the lock of a folder and writes into `lines` beside it."""
    log = keywords.pop("log", os.devnull)
    process = start("locked_folder.py", folder, HANG, 0.2, 2.0, log, *options, **keywords)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n", process.communicate()[1]
        yield process
    finally:
        process.kill()
        process.communicate()


def write_lease(folder: Path, machine: str = "another boot") -> Path:
    """Write the lease of a process on another machine."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{LEASE_FILE}-000001"
    content = {"pid": 12, "host": "node7", "machine": machine, "id": "abc", "renewals": 1000, "is_released": False}
    path.write_text(json.dumps(content))
    return path


@contextmanager
def renew(path: Path) -> Iterator[None]:
    """Renew a lease of another machine again and again."""
    done = threading.Event()

    def update() -> None:
        content = path.read_text()
        for renewals in range(1001, 10_000):
            if done.wait(0.1):
                return
            with suppress(FileNotFoundError), path.open("r+") as file:  # a file that is gone is not made again
                file.write(content.replace("1000", str(renewals)))

    thread = threading.Thread(target=update)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def test_a_folder_in_use_names_who_uses_it_until_that_one_is_dead(tmp_path):
    with hold_lock(tmp_path / "run") as other:
        where = f"is in use by process {other.pid} on {HOST}"
        with pytest.raises(TransientError, match=where), lock_folder(tmp_path / "run", config=FAST):
            pass
        with lock_folder(tmp_path / "other", config=FAST):
            pass
        other.send_signal(signal.SIGKILL)
        other.wait()
        began = time.monotonic()
        with lock_folder(tmp_path / "run", config=FAST):
            assert time.monotonic() - began < FAST.expires_after
            where = f"in use by process {os.getpid()}"
            with pytest.raises(TransientError, match=where), lock_folder(tmp_path / "run", config=FAST):
                pass
    with lock_folder(tmp_path / "run", config=FAST):
        pass


def test_the_lock_file_tells_when_the_newest_run_began(tmp_path):
    """The page of a run reads it."""
    with lock_folder(tmp_path, config=FAST):
        pass
    os.utime(tmp_path / LOCK_FILE, (5.0, 5.0))
    began = time.time()
    with lock_folder(tmp_path, config=FAST):
        assert (tmp_path / LOCK_FILE).stat().st_mtime > began - 5


@pytest.mark.nightly
def test_a_second_start_ends_with_a_code_that_asks_for_another(tmp_path):
    with lock_folder(tmp_path, config=FAST):
        other = start("locked_folder.py", tmp_path, 0, 0.2, 2, os.devnull)
        _, err = other.communicate(timeout=HANG)
    assert other.returncode == 75
    assert err.startswith(f"error: {tmp_path} is in use by process {os.getpid()} on {HOST}")


def test_the_lease_of_a_dead_machine_expires(tmp_path, capfd):
    """A server may keep the flock of a machine that is gone, which renews no lease."""
    write_lease(tmp_path)
    with (tmp_path / LOCK_FILE).open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        began = time.monotonic()
        with lock_folder(tmp_path, config=FAST):
            assert time.monotonic() - began >= FAST.expires_after
            check_locks()
    assert " on node7; waiting up to 2 s" in capfd.readouterr().err


def test_a_flock_of_this_machine_holds_whatever_the_lease(tmp_path):
    """Its holder may be suspended, also in another container, whose processes have other numbers."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    write_lease(tmp_path, f"{boot} another container")
    with (tmp_path / LOCK_FILE).open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        error = "is in use by process 12 on node7"
        with pytest.raises(TransientError, match=error), lock_folder(tmp_path, config=FAST):
            pass


def test_a_lease_that_another_machine_renews_holds(tmp_path):
    error = r"is in use by process \d+ on node7"
    with renew(write_lease(tmp_path)), pytest.raises(TransientError, match=error), lock_folder(tmp_path, config=FAST):
        pass


def test_a_predecessor_that_ends_is_followed(tmp_path):
    """A pod may be started again while its predecessor on another machine still ends."""
    path = write_lease(tmp_path)
    thread = threading.Timer(0.5, path.unlink)
    thread.start()
    began = time.monotonic()
    with renew(path), lock_folder(tmp_path, config=FAST):
        assert time.monotonic() - began < FAST.expires_after
    thread.join()


def test_a_flock_without_a_lease_holds(tmp_path):
    """A process has just taken the one, and will take the other."""
    with (tmp_path / LOCK_FILE).open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(TransientError, match="in use by another process"), lock_folder(tmp_path, config=FAST):
            pass


@pytest.mark.slow
def test_a_process_that_was_suspended_for_longer_than_its_lease_goes_on(tmp_path):
    log = tmp_path / "lines"
    with hold_lock(tmp_path / "run", log=log) as other:
        wait_until(lambda: log.exists() and log.stat().st_size > 0)
        other.send_signal(signal.SIGSTOP)
        with pytest.raises(TransientError, match="in use"), lock_folder(tmp_path / "run", config=FAST):
            pass
        time.sleep(1.5 * FAST.expires_after)
        size = log.stat().st_size
        other.send_signal(signal.SIGCONT)
        wait_until(lambda: log.stat().st_size > size + 100)
        assert other.poll() is None


@pytest.mark.nightly
@pytest.mark.parametrize("place", ["disk", pytest.param("gs://bucket/run", marks=pytest.mark.slow)])
def test_a_process_whose_folder_another_machine_took_while_it_was_suspended_writes_no_more(tmp_path, place):
    log = tmp_path / "lines"
    folder = place if "://" in place else tmp_path / "run"
    options = [] if "://" in place else ["no-flock"]
    with hold_lock(folder, *options, log=log, bucket=tmp_path) as other:
        wait_until(lambda: log.exists() and log.stat().st_size > 0)
        other.send_signal(signal.SIGSTOP)
        if isinstance(folder, Path):
            (folder / f"{LEASE_FILE}-000001").unlink()
            write_lease(folder)
        else:
            contender = start("locked_folder.py", folder, 0, 0.2, 2.0, os.devnull, bucket=tmp_path)
            out, err = contender.communicate(timeout=HANG)
            assert (contender.returncode, out) == (0, "held\n"), err
        size = log.stat().st_size
        other.send_signal(signal.SIGCONT)
        out, err = other.communicate(timeout=HANG)
        assert (other.returncode, out) == (75, "end of the output")
        assert log.stat().st_size == size
    assert err.splitlines()[-1].startswith(f"error: the lock of {folder} is lost")


@pytest.mark.parametrize("address", ["memory://bucket/run", "gs://bucket/run"])
def test_an_address_is_locked(tmp_path, memory, monkeypatch, address):
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    monkeypatch.setitem(_registry, "gs", exclusive_bucket.ExclusiveBucket)
    with lock_folder(address, config=FAST):
        where = f"{address} is in use by process {os.getpid()}"
        with pytest.raises(TransientError, match=where), lock_folder(address, config=FAST):
            pass
        check_locks()
    began = time.monotonic()
    with lock_folder(to_storage_path(address), config=FAST):
        assert time.monotonic() - began < FAST.expires_after
    assert [path.name for path in to_storage_path(address).iterdir()] == [".lease-000002"]


def test_the_lease_of_an_address_that_nobody_renews_expires(memory, monkeypatch):
    place = to_storage_path("memory://bucket/run")
    content = {"pid": 12, "host": "node7", "id": "abc", "renewals": 3, "is_released": False}
    place.fs.pipe_file((place / ".lease-000007").path, json.dumps(content).encode())
    with lock_folder(place, config=FAST):
        assert [path.name for path in place.iterdir()] == [".lease-000008"]
        place.fs.pipe_file((place / ".lease-000009").path, b"another has taken it over")
        monkeypatch.setattr(folder_lock, "exit_now", lambda _: time.sleep(600))
        with pytest.raises(TransientError, match="run is lost"):
            check_locks()


@pytest.mark.nightly
def test_an_address_is_taken_over_also_where_each_look_takes_long(memory, monkeypatch):
    place = to_storage_path("memory://bucket/run")
    content = {"pid": 12, "host": "node7", "id": "abc", "renewals": 3, "is_released": False}
    place.fs.pipe_file((place / ".lease-000007").path, json.dumps(content).encode())
    read = folder_lock._Lease._read

    def look_slowly(lease, number):
        time.sleep(FAST.renew_every)
        return read(lease, number)

    monkeypatch.setattr(folder_lock._Lease, "_read", look_slowly)
    with lock_folder(place, config=FAST):
        assert [path.name for path in place.iterdir()] == [".lease-000008"]


@pytest.mark.nightly
def test_storage_that_stalls_for_longer_than_the_lease_gives_nobody_the_address(memory, monkeypatch):
    """Neither the holder's renewals nor the looks of who waits come through for a while."""
    place = to_storage_path("memory://bucket/run")
    content = {"pid": 12, "host": "node7", "id": "abc", "is_released": False}
    count = 0
    read = folder_lock._Lease._read

    def stall(lease, number):
        nonlocal count
        count += 1
        if count == 2:
            time.sleep(1.5 * FAST.expires_after)
        elif count > 2:
            place.fs.pipe_file((place / ".lease-000001").path, json.dumps({**content, "renewals": count}).encode())
        return read(lease, number)

    place.fs.pipe_file((place / ".lease-000001").path, json.dumps(content).encode())
    monkeypatch.setattr(folder_lock._Lease, "_read", stall)
    with pytest.raises(TransientError, match="is in use by process 12 on node7"), lock_folder(place, config=FAST):
        pass
    assert [path.name for path in place.iterdir()] == [".lease-000001"]


def test_a_dead_process_of_this_machine_holds_no_address(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    monkeypatch.setitem(_registry, "gs", exclusive_bucket.ExclusiveBucket)
    with hold_lock("gs://bucket/run", bucket=tmp_path) as other:
        other.send_signal(signal.SIGKILL)
        other.wait()
    config = LeaseConfig(renew_every=10.0, expires_after=60.0)
    began = time.monotonic()
    with lock_folder("gs://bucket/run", config=config):
        assert time.monotonic() - began < 30


@pytest.mark.slow
def test_the_processes_of_a_run_hold_one_lock_or_end_together(tmp_path):
    program = "lock_in_two_processes.py"
    for output in run_together(program, str(tmp_path / "run")):
        assert "held True" in output.splitlines()
    with renew(write_lease(tmp_path / "other")):
        for output in run_together(program, str(tmp_path / "other")):
            line = next(line for line in output.splitlines() if line.startswith("error"))
            assert line.startswith("error TransientError 75 ")
            assert "on node7" in line
    (tmp_path / "file").write_text("")
    for output in run_together(program, str(tmp_path / "file" / "run")):
        line = next(line for line in output.splitlines() if line.startswith("error"))
        assert line.startswith("error UserError 2 ")
        assert "cannot be written (Not a directory)" in line


@pytest.mark.slow
@pytest.mark.parametrize("place", mark_nightly_except(["bucket"], ["disk", "disk without flock", "bucket", "google"]))
def test_of_two_that_start_at_once_exactly_one_has_the_folder(tmp_path, place):
    """They compete ten times. Google's client creates a file on the condition that there is none."""
    (tmp_path / "meeting").mkdir()
    options = ["no-flock"] if place == "disk without flock" else []
    folder = str(tmp_path / "disk") if place.startswith("disk") else "gs://bucket/run"
    with serve() if place == "google" else nullcontext():
        if place == "google":
            pytest.importorskip("gcsfs")
            options.append("google")
        processes = [
            start("contending_locks.py", own, other, tmp_path / "meeting", folder, 10, *options, bucket=tmp_path)
            for own, other in (("a", "b"), ("b", "a"))
        ]
        outputs = [process.communicate(timeout=HANG) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert sorted(int(line) for out, _ in outputs for line in out.split()) == list(range(10))


def test_the_end_waits_for_no_storage_that_hangs_and_says_once_that_renewals_fail(memory, monkeypatch, capfd):
    place = to_storage_path("memory://bucket/run")

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "the disk is away")

    with lock_folder(place, config=FAST):
        monkeypatch.setattr(folder_lock._Lease, "_find_newest", fail)
        time.sleep(4 * FAST.renew_every)
        with pytest.raises(TransientError, match="cannot be locked now"):
            check_locks()
    assert capfd.readouterr().err.count("cannot be renewed now") == 1


def test_a_lock_is_released_if_the_meeting_of_the_processes_fails(tmp_path, monkeypatch):
    def fail(_: str, function: Any) -> None:
        function()
        raise RuntimeError("the first process is gone")

    with monkeypatch.context() as patch:
        patch.setattr(folder_lock, "call_together", fail)
        with pytest.raises(RuntimeError, match="is gone"), lock_folder(tmp_path, config=FAST):
            pass
    with lock_folder(tmp_path, config=FAST):
        pass


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
