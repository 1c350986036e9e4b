"""Several processes write one data set in a bucket, as a scheduler starts them; each may be killed at any time."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from fsspec.registry import _registry

from dit_video.core.errors import UserError
from dit_video.data.clips import ClipSource
from dit_video.data.ingest import parts
from dit_video.data.ingest.engine import IngestConfig, complete_ingest, ingest, plan_ingest, write_parts
from dit_video.video import Clip
from support.devices import HANG, PROGRAMS, make_environment
from support.shared_bucket import VARIABLE, SharedBucket

SETTINGS = ("--reencode.max-pixels", "1600", "--screening.max-clip-seconds", "0.5", "--screening.min-shot", "0.2")


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """Return the folder of a bucket with clips, `gs://clips`."""
    folder = tmp_path / "bucket"
    (folder / "clips").mkdir(parents=True)
    for number in range(12):
        size = 24 + 8 * (number % 4)
        frames = np.random.default_rng(number).integers(0, 255, (3 + number, size, 48, 3), np.uint8)
        Clip(frames=frames, fps=10).save(folder / "clips" / f"{number:02}.mp4")
    (folder / "clips" / "05.mp4").write_bytes(b"broken")
    (folder / "clips" / "02.txt").write_text("a film")
    monkeypatch.setenv(VARIABLE, str(folder))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "temporary").mkdir()
    for name in SharedBucket.protocol:
        monkeypatch.setitem(_registry, name, SharedBucket)
    return folder


def start(destination: str, *arguments: str) -> subprocess.Popen:
    program = str(PROGRAMS / "sharded_ingest.py")
    environment = make_environment(1)
    environment["PYTHONPATH"] = os.pathsep.join([environment["PYTHONPATH"], str(PROGRAMS)])
    command = [sys.executable, "-P", program, "gs://clips", destination, *SETTINGS, "--workers", "1", *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> None:
    _, errors = process.communicate(timeout=HANG)
    assert process.returncode == 0, errors


def read_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_three_processes_of_which_one_is_killed_write_the_bytes_of_one(bucket, tmp_path):
    finish(start("gs://one"))
    draw = random.Random(0)
    processes = {shard: start("gs://three", "--shard", str(shard), "--shards", "3") for shard in (0, 2)}
    for _ in range(3):  # one process, at random times, from its imports to its last part
        killed = start("gs://three", "--shard", "1", "--shards", "3")
        time.sleep(draw.uniform(2, 8))
        killed.send_signal(signal.SIGKILL)
        killed.communicate()
    for process in processes.values():
        finish(process)
    finish(start("gs://three", "--shard", "1", "--shards", "3"))
    one, three = read_files(bucket / "one"), read_files(bucket / "three")
    assert one.keys() == three.keys()
    assert [name for name in one if one[name] != three[name]] == []
    assert len([name for name in one if name.endswith(".array_record")]) == 12
    first, second = ClipSource("gs://one"), ClipSource("gs://three")
    assert len({name.partition("#")[0] for name in second.column("name")}) == 11
    assert set(second.column("method")) == {"copy", "encode", "whole"}
    assert [second[index] for index in range(len(second))] == [first[index] for index in range(len(first))]


def test_the_last_process_completes_the_data_set(bucket, tmp_path, monkeypatch):
    """Whichever that is, and whether the others run at the same time or one after another."""
    monkeypatch.setattr(parts, "_MIN_PART_BYTES", 1)
    clips, config = bucket / "clips", IngestConfig()
    ingest(clips, tmp_path / "one")
    folders = [plan_ingest(clips, tmp_path / "three", config=config) for _ in range(3)]
    for shard in (2, 0, 1):
        assert len(folders[shard].list_unfinished()) == {2: 12, 0: 8, 1: 4}[shard]
        write_parts(folders[shard], folders[shard].parts[shard::3], config=config)
    assert folders[2].list_unfinished() == []
    report = complete_ingest(folders[1], config)
    assert (report.files, report.usable) == (12, 11)
    assert read_files(tmp_path / "one") == read_files(tmp_path / "three")


@pytest.mark.parametrize("first", ["parts-000.parquet", "skipped.json"])
def test_a_process_that_is_killed_while_it_plans_is_no_obstacle(bucket, tmp_path, first):
    config = IngestConfig()
    plan_ingest(bucket / "clips", tmp_path / "out", config=config)
    for path in (tmp_path / "out" / "ingest").iterdir():
        if path.name not in (first, "settings.json"):
            path.unlink()
    ingest(bucket / "clips", tmp_path / "out")
    ingest(bucket / "clips", tmp_path / "undisturbed")
    assert read_files(tmp_path / "out") == read_files(tmp_path / "undisturbed")


def test_the_command_refuses_a_shard_that_is_not_there(bucket, tmp_path, script):
    for options, message in [
        (("--shard", "3", "--shards", "3"), "--shard 3 --shards 3 is invalid: a shard is one of 0 to shards - 1."),
        (("--shards", "3"), "--shard None --shards 3 is invalid"),
        (("--shard", "1"), "--shard 1 --shards None is invalid"),
        (("--shard", "0", "--shards", "2", "--ray"), "--shards, --beam and --ray exclude each other"),
    ]:
        ended = script("tools/ingest.py", bucket / "clips", tmp_path / "out", *options)
        assert ended.code == 2
        assert message in ended.err
    assert not (tmp_path / "out").exists()


@pytest.mark.nightly
def test_the_command_says_which_process_has_written_its_parts(bucket, tmp_path, script, monkeypatch):
    monkeypatch.setattr(parts, "_MIN_PART_BYTES", 1)
    command = ("tools/ingest.py", bucket / "clips", tmp_path / "out", "--shards", "2")
    ended = script(*command, "--shard", "1")
    assert ended.code == 0, ended.err
    assert "process 1 has written its parts; the last one writes the table" in ended.out
    with pytest.raises(UserError, match="it is not finished"):
        ClipSource(tmp_path / "out")
    ended = script(*command, "--shard", "0")
    assert ended.code == 0, ended.err
    assert "11 clips" in ended.out
    assert (tmp_path / "out" / "REPORT.html").is_file()
