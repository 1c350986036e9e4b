"""A lease that was lost is not renewed, and its storage is not asked more often than need be."""

import os

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from dit_video.core.errors import TransientError
from dit_video.core.storage import to_storage_path
from dit_video.training.lease import Lease, LeaseConfig, read_newest_lease

FAST = LeaseConfig(renew_every=0.1, expires_after=1.0, settle=0.0)


def test_a_lease_whose_file_its_successor_has_removed_is_lost_whatever_a_list_says(tmp_path, monkeypatch):
    """Lists of a network disk may be old."""
    first = Lease.try_create(tmp_path, 1, FAST, has_file_lock=False)
    second = Lease.try_create(tmp_path, 2, FAST, has_file_lock=False)
    assert first is not None
    assert second is not None
    assert os.listdir(tmp_path) == [".lease-000002"]
    with monkeypatch.context() as patch:
        patch.setattr("os.listdir", lambda _: [".lease-000001"])
        assert not first.renew()
        first.release()
    assert not first.renew()
    assert os.listdir(tmp_path) == [".lease-000002"]
    assert second.renew()


@pytest.mark.parametrize("address", [False, True])
def test_a_lease_whose_file_is_gone_or_of_another_is_lost(tmp_path, memory, address):
    folder = to_storage_path("memory://bucket/run") if address else tmp_path
    lease = Lease.try_create(folder, 1, FAST, has_file_lock=False)
    assert lease is not None
    assert lease.renew()
    path = folder / ".lease-000001"
    content = path.read_text()
    path.write_text(content.replace(lease.id, "other"))
    assert not lease.renew()
    path.unlink()
    assert not lease.renew()
    assert not path.exists()


def test_a_file_that_is_removed_while_a_lease_is_renewed_is_not_made_again(tmp_path, monkeypatch):
    lease = Lease.try_create(tmp_path, 1, FAST, has_file_lock=False)
    assert lease is not None
    opened = os.open

    def remove_first(path, *arguments):
        path.unlink()
        return opened(path, *arguments)

    monkeypatch.setattr("os.open", remove_first)
    assert not lease.renew()
    assert os.listdir(tmp_path) == []


def test_a_client_that_tries_again_itself_is_called_once(memory, monkeypatch):
    calls = []

    def fail(self, path, **_):
        if path.endswith("/run"):
            calls.append(path)
            raise TimeoutError("slow")
        return []

    folder = to_storage_path("memory://bucket/run")
    monkeypatch.setattr(MemoryFileSystem, "retries", 6, raising=False)
    monkeypatch.setattr(MemoryFileSystem, "ls", fail)
    with pytest.raises(TransientError):
        read_newest_lease(folder)
    assert len(calls) == 1
