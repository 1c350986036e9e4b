"""A run's folder at an address, and the copies of it."""

import threading
import time
from pathlib import Path

import pytest
from upath import UPath

from dit_video.core.errors import UserError
from dit_video.experiment import datasets
from dit_video.experiment.remote_folder import MANIFEST, RemoteFolder, get_local_copy


@pytest.fixture
def address(memory) -> str:
    """Return the address of a run that does not exist yet."""
    return f"{memory}/runs/mine"


def make(address: str, local: Path) -> RemoteFolder:
    return RemoteFolder(address, local, whole_folders=("pipeline",))


def write(folder: Path, **texts: str) -> None:
    for name, text in texts.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def read(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_files_that_were_sent_are_fetched_by_another_machine(address, tmp_path):
    one, two = (make(address, tmp_path / name) for name in ("one", "two"))
    one.fetch()  # there is nothing yet
    write(one.local, config_json="{}", denoiser__metrics_jsonl="1\n", pipeline__weights_bin="abc")
    write(one.local / "denoiser", _lock="held", _half_partial="x")
    one.send()
    two.fetch()
    expected = {"config.json": "{}", "denoiser/metrics.jsonl": "1\n", "pipeline/weights.bin": "abc"}
    assert read(two.local) == expected
    # A log grows, a folder of results goes, a file of the other copy that was never sent goes, too.
    write(one.local, denoiser__metrics_jsonl="1\n2\n")
    (one.local / "pipeline" / "weights.bin").unlink()
    one.send()
    write(two.local, lost_txt="never sent")
    two.fetch()
    assert read(two.local) == {"config.json": "{}", "denoiser/metrics.jsonl": "1\n2\n"}
    assert not (two.local / "pipeline").exists()
    assert not (UPath(address) / "pipeline" / "weights.bin").exists()


def test_only_changes_are_copied(address, tmp_path, monkeypatch):
    one, two = (make(address, tmp_path / name) for name in ("one", "two"))
    write(one.local, a_txt="a", b_txt="b")
    one.send()
    two.fetch()
    copied: list[str] = []
    filesystem = type(one.address.fs)
    put, get = filesystem.put_file, filesystem.get_file
    monkeypatch.setattr(
        filesystem, "put_file", lambda self, s, t: (copied.append(f"put {Path(t).name}"), put(self, s, t))
    )
    monkeypatch.setattr(
        filesystem, "get_file", lambda self, s, t: (copied.append(f"get {Path(s).name}"), get(self, s, t))
    )
    one.send()
    two.fetch()
    assert copied == []
    write(one.local, b_txt="c")
    make(address, one.local).send()  # as after a restart, which hashes the files again
    two.fetch()
    assert copied == ["put b.txt", "get b.txt"]


def test_files_of_an_interrupted_upload_are_not_part_of_the_folder(address, tmp_path, monkeypatch):
    one, two = (make(address, tmp_path / name) for name in ("one", "two"))
    write(one.local, config_json="{}", pipeline__config_json="old", pipeline__weights_bin="old")
    one.send()
    write(one.local, pipeline__config_json="new", pipeline__weights_bin="new", stage__weights_bin="new")
    with monkeypatch.context() as patch:
        patch.setattr("dit_video.experiment.remote_folder.write_document", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            one.send()
    assert (UPath(address) / "stage" / "weights.bin").exists()
    two.fetch()
    # The files of `pipeline` are of two times, so that it has to be made again.
    assert read(two.local) == {"config.json": "{}"}
    one.send()
    two.fetch()
    assert read(two.local)["pipeline/weights.bin"] == read(two.local)["stage/weights.bin"] == "new"


def test_changes_are_sent_at_intervals_and_at_the_end(address, tmp_path):
    one, two = (make(address, tmp_path / name) for name in ("one", "two"))
    write(one.local, log_txt="1")
    with one.keep_sent(seconds=0.02):
        deadline = time.monotonic() + 20
        while not (UPath(address) / MANIFEST).exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        write(one.local, log_txt="12")
    two.fetch()
    assert read(two.local) == {"log.txt": "12"}
    assert threading.active_count() < 50


def test_an_interval_whose_upload_fails_is_warned_of_and_the_next_one_sends(address, tmp_path, monkeypatch, recwarn):
    one = make(address, tmp_path / "one")
    write(one.local, log_txt="1")
    filesystem = type(one.address.fs)
    put, calls = filesystem.put_file, []

    def put_file(self, *arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise PermissionError("denied")
        return put(self, *arguments)

    monkeypatch.setattr(filesystem, "put_file", put_file)
    with one.keep_sent(seconds=0.02):
        deadline = time.monotonic() + 20
        while not (UPath(address) / MANIFEST).exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert any("files of the run are not at memory://" in str(warning.message) for warning in recwarn.list)


def test_the_error_of_a_run_is_not_hidden_by_one_of_its_last_upload(address, tmp_path, monkeypatch, capsys):
    one = make(address, tmp_path / "one")
    write(one.local, log_txt="1")

    def put_file(*_):
        raise PermissionError("denied")

    monkeypatch.setattr(type(one.address.fs), "put_file", put_file)
    with pytest.raises(KeyError, match="the run's own"), one.keep_sent():
        raise KeyError("the run's own")
    assert "denied" in capsys.readouterr().err
    with pytest.raises(UserError, match="denied"), one.keep_sent():
        pass


def test_a_manifest_of_another_version_is_refused(address, tmp_path):
    (UPath(address) / MANIFEST).write_text('{"format": 2, "files": {}, "linked": []}')
    with pytest.raises(UserError, match="has format 2, but this version reads 1"):
        make(address, tmp_path / "one").fetch()


def test_folders_that_stand_for_others_do_so_on_every_machine_and_after_a_move(address, memory, tmp_path):
    one, two = (make(address, tmp_path / name) for name in ("one", "two"))
    datasets.link_folder(one.local / "latents", f"{address}/latents")
    datasets.link_folder(one.local / "stages" / "small" / "latents", f"{address}/stages/small/latents")
    datasets.link_folder(one.local / "data", f"{memory}/elsewhere")
    one.send()
    assert not (UPath(address) / "latents").exists()  # it is for the latents alone
    two.fetch()
    assert str(datasets.resolve(two.local / "latents")) == f"{address}/latents"
    assert str(datasets.resolve(two.local / "data")) == f"{memory}/elsewhere"
    one.send()
    two.fetch()
    two.address.fs.copy(f"{address}/", f"{memory}/moved/", recursive=True)
    moved = make(f"{memory}/moved", tmp_path / "three")
    moved.fetch()
    assert str(datasets.resolve(moved.local / "latents")) == f"{memory}/moved/latents"
    assert str(datasets.resolve(moved.local / "stages/small/latents")) == f"{memory}/moved/stages/small/latents"
    assert str(datasets.resolve(moved.local / "data")) == f"{memory}/elsewhere"


def test_each_address_has_a_copy_of_its_own(memory):
    names = {get_local_copy(f"{memory}/{name}", purpose=purpose) for name in ("a", "b") for purpose in ("read", "x")}
    assert len(names) == 4
    assert get_local_copy(f"{memory}/a/", purpose="read") in names
