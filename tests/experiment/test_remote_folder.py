"""A run's folder at an address, and the copies of it."""

import json
import shutil
import threading
import time
from pathlib import Path

import pytest
from upath import UPath

from dit_video.core.errors import UserError
from dit_video.data.ingest.engine import ingest
from dit_video.experiment import datasets
from dit_video.experiment.remote_folder import MANIFEST, RemoteFolder, get_local_copy


@pytest.fixture
def address(memory) -> str:
    """Return the address of a run that does not exist yet."""
    return f"{memory}/runs/mine"


def make(address: str, local: Path) -> RemoteFolder:
    return RemoteFolder(address, local)


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
    pipe, get = filesystem.pipe_file, filesystem.get_file

    def pipe_file(self, path, value, **options):
        copied.append(f"put {Path(path).name}")
        return pipe(self, path, value, **options)

    def get_file(self, source, target):
        copied.append(f"get {Path(source).name}")
        return get(self, source, target)

    monkeypatch.setattr(filesystem, "pipe_file", pipe_file)
    monkeypatch.setattr(filesystem, "get_file", get_file)
    one.send()
    two.fetch()
    assert copied == []
    write(one.local, b_txt="c")
    make(address, one.local).send()  # as after a restart, which hashes the files again
    two.fetch()
    assert copied == ["put b.txt", f"put {MANIFEST}", "get b.txt"]


def test_files_of_an_interrupted_upload_are_not_part_of_the_folder(address, tmp_path, monkeypatch):
    one, two = (make(address, tmp_path / name) for name in ("one", "two"))
    write(one.local, config_json="{}", pipeline__config_json="old", pipeline__weights_bin="old")
    write(one.local, model__pipeline__config_json="old", model__pipeline__weights_bin="old")  # of a nested run
    one.send()
    write(one.local, pipeline__config_json="new", pipeline__weights_bin="new", stage__weights_bin="new")
    write(one.local, model__pipeline__weights_bin="new")
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
    pipe, calls = filesystem.pipe_file, []

    def pipe_file(self, *arguments, **options):
        calls.append(arguments)
        if len(calls) == 1:
            raise PermissionError("denied")
        return pipe(self, *arguments, **options)

    monkeypatch.setattr(filesystem, "pipe_file", pipe_file)
    with one.keep_sent(seconds=0.02):
        deadline = time.monotonic() + 20
        while not (UPath(address) / MANIFEST).exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert any("files of the run are not at memory://" in str(warning.message) for warning in recwarn.list)


def test_the_error_of_a_run_is_not_hidden_by_one_of_its_last_upload(address, tmp_path, monkeypatch, capsys):
    one = make(address, tmp_path / "one")
    write(one.local, log_txt="1")

    def pipe_file(*_, **__):
        raise PermissionError("denied")

    monkeypatch.setattr(type(one.address.fs), "pipe_file", pipe_file)
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


def test_ingested_clips_of_a_run_at_an_address_lie_at_it_and_move_with_it(address, tiny_clips, memory, tmp_path):
    remote = make(address, tmp_path / "one")
    home = remote.address / "data"
    datasets.link_datasets(remote.local / "data", [tiny_clips], home=home)
    assert datasets.open_datasets(f"{address}/data").infos
    remote.send()
    manifest = json.loads((UPath(address) / MANIFEST).read_text())
    assert manifest["linked"] == ["data"]
    assert "bucket" not in json.dumps(manifest)
    # A later start needs the clips no more.
    datasets.check_datasets([str(tmp_path / "gone")], workdir=address)
    datasets.link_datasets(remote.local / "data", [str(tmp_path / "clips")], home=home)
    ingest(tiny_clips, tmp_path / "ingested")
    with pytest.raises(UserError, match="is on this machine, the run at"):
        datasets.link_datasets(tmp_path / "two" / "data", [tmp_path / "ingested"], home=home)


def test_a_file_that_is_removed_while_it_is_fetched_is_no_error(address, tmp_path, monkeypatch):
    one, two = (make(address, tmp_path / name) for name in ("one", "two"))
    write(one.local, a_txt="a", b_txt="b")
    one.send()
    filesystem = type(one.address.fs)
    get, is_first = filesystem.get_file, [True]

    def get_file(self, source, target):
        if is_first and source.endswith("b.txt"):
            is_first.clear()
            (one.local / "b.txt").unlink()
            one.send()
        return get(self, source, target)

    monkeypatch.setattr(filesystem, "get_file", get_file)
    two.fetch()
    assert read(two.local) == {"a.txt": "a"}


def test_files_that_vanish_are_not_sent(address, tmp_path, monkeypatch):
    one = make(address, tmp_path / "one")
    write(one.local, a_txt="a", b_txt="b")
    real = Path.read_bytes

    def read_bytes(self):
        if self.name == "b.txt":
            self.unlink()
        return real(self)

    with monkeypatch.context() as patch:
        patch.setattr(type(one.local), "read_bytes", read_bytes)
        one.send()
    assert set(json.loads((UPath(address) / MANIFEST).read_text())["files"]) == {"a.txt"}


def test_folders_that_come_and_go_meanwhile_are_no_error(address, tmp_path):
    one = make(address, tmp_path / "one")
    write(one.local, a_txt="a")
    ended = threading.Event()

    def change():
        while not ended.is_set():
            write(one.local / "folder" / "inner", b_txt="b")
            shutil.rmtree(one.local / "folder", ignore_errors=True)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(50):
            one.send()
    finally:
        ended.set()
        thread.join()


def test_a_log_that_grows_while_it_is_sent_has_the_hash_of_what_was_sent(address, tmp_path, monkeypatch):
    one, two = (make(address, tmp_path / name) for name in ("one", "two"))
    write(one.local, log_txt="1")
    filesystem = type(one.address.fs)
    pipe = filesystem.pipe_file

    def pipe_file(self, path, value, **options):
        if path.endswith("log.txt"):
            write(one.local, log_txt="12")
        return pipe(self, path, value, **options)

    with monkeypatch.context() as patch:
        patch.setattr(filesystem, "pipe_file", pipe_file)
        one.send()
    two.fetch()
    assert read(two.local) == {"log.txt": "1"}
    assert two._get_md5("log.txt") == json.loads((UPath(address) / MANIFEST).read_text())["files"]["log.txt"]["md5"]
    one.send()
    two.fetch()
    assert read(two.local) == {"log.txt": "12"}


def test_each_address_has_a_copy_of_its_own(memory):
    names = {get_local_copy(f"{memory}/{name}", purpose=purpose) for name in ("a", "b") for purpose in ("read", "x")}
    assert len(names) == 4
    assert get_local_copy(f"{memory}/a/", purpose="read") in names
