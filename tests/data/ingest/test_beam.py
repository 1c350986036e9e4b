"""Ingest with Apache Beam's in-process runner: the data set has the same bytes as without it.

Needs the `[beam]` extra, which requires other versions than constraints.txt has: `.ci/run beam`, or
`pip install -e '.[test,beam]' -c constraints-beam.txt` into an environment of its own.
"""

import os
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from dit_video.core.errors import UserError
from dit_video.data.clips import ClipSource
from dit_video.data.ingest import workers
from dit_video.data.ingest.engine import IngestConfig, ingest
from dit_video.data.records import clip_writer
from dit_video.data.records.cluster import BeamOptions
from dit_video.video import Clip
from support.devices import HANG, PROGRAMS

pytest.importorskip("apache_beam")


@pytest.fixture
def beam_options(monkeypatch):
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.runners.portability.fn_api_runner import FnApiRunner

    monkeypatch.setattr(sys, "argv", sys.argv[:1])  # Beam reads them
    return BeamOptions(runner=FnApiRunner(), options=PipelineOptions([]))


@pytest.fixture
def log(tmp_path, monkeypatch):
    """Return the file into which workers write the names of clips that they inspect."""
    (tmp_path / "log").mkdir()
    monkeypatch.setenv("DIT_VIDEO_TEST_LOG", str(tmp_path / "log"))
    monkeypatch.syspath_prepend(PROGRAMS)
    monkeypatch.setattr(workers, "MODULE", "interrupted_worker")
    return tmp_path / "log" / "inspected"


@pytest.fixture
def clips(tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    for index in range(9):
        frames = np.random.default_rng(index).integers(0, 255, (3, 32, 32 + 16 * index, 3), np.uint8)
        Clip(frames=frames, fps=10).save(folder / f"{index}.mp4")
        (folder / f"{index}.txt").write_text(f"clip {index}")
    (folder / "3.mp4").write_bytes(b"broken")
    return folder


@pytest.mark.parametrize("shard_bytes", [1 << 30, 20_000, 1])
def test_a_pipeline_writes_the_same_bytes(clips, tmp_path, beam_options, monkeypatch, shard_bytes):
    monkeypatch.setattr(clip_writer, "SHARD_BYTES", shard_bytes)
    here = ingest(clips, tmp_path / "here")
    there = ingest(clips, tmp_path / "there", beam=beam_options)
    assert here == there
    files = sorted(path.name for path in (tmp_path / "here").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "there").iterdir())
    assert [
        name for name in files if (tmp_path / "here" / name).read_bytes() != (tmp_path / "there" / name).read_bytes()
    ] == []
    shards = len([name for name in files if "array_record" in name])
    assert shards == {1 << 30: 1, 1: 8}.get(shard_bytes, shards)
    assert shard_bytes != 20_000 or 1 < shards < 8
    source = ClipSource(tmp_path / "there")
    assert [source[index] for index in range(8)] == [(clips / info.name).read_bytes() for info in source.infos]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clips", "here", "there"]


def read_files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_crash_in_a_decoder_does_not_end_the_pipeline(clips, tmp_path, beam_options, log):
    (clips / "5.mp4").rename(clips / "5_crash.mp4")
    report = ingest(clips, tmp_path / "out", config=IngestConfig(time_limit=60), beam=beam_options)
    assert [name for name, _ in report.quarantined] == ["3.mp4", "5_crash.mp4"]
    assert report.usable == 7
    assert report.passing == ()


def test_a_killed_pipeline_inspects_nothing_again(clips, tmp_path, beam_options, log):
    for path in sorted(clips.glob("?.mp4")):
        path.rename(path.with_name(f"{path.stem}_slow.mp4"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    run = subprocess.Popen(
        [sys.executable, str(PROGRAMS / "interrupted_beam_ingest.py"), str(clips), str(tmp_path / "out")],
        env=environment,
    )
    deadline = time.monotonic() + HANG
    while not log.exists() or len(log.read_text().split()) < 4:
        assert run.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    run.send_signal(signal.SIGKILL)
    run.wait()
    before = log.read_text().split()
    assert 4 <= len(before) < 9
    seen = []
    ingest(clips, tmp_path / "out", beam=beam_options, progress=lambda done, total: seen.append(done))
    assert seen[0] >= 3
    inspected = log.read_text().split()
    assert len(set(inspected)) == 9
    assert len(inspected) <= 9 + 1  # what was being decoded when it was killed
    ingest(clips, tmp_path / "undisturbed")
    assert read_files(tmp_path / "out") == read_files(tmp_path / "undisturbed")
    assert not (tmp_path / "out.ingest").exists()


def test_clips_that_failed_for_transient_reasons_are_retried(clips, tmp_path, beam_options, log):
    (clips / "4.mp4").rename(clips / "4_unreadable.mp4")
    (clips / "5.mp4").rename(clips / "5_first.mp4")
    report = ingest(clips, tmp_path / "out", beam=beam_options)
    assert report.passing == ("4_unreadable.mp4",)
    assert report.usable == 7
    log.unlink()
    (log.parent / "mended").touch()
    assert ingest(clips, tmp_path / "out", beam=beam_options, retry=True).usable == 8
    assert log.read_text().split() == ["4_unreadable.mp4"]
    assert not (tmp_path / "out.ingest").exists()


def test_workers_may_run_in_another_folder(clips, tmp_path, beam_options, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def leave(done, total):
        os.chdir(tmp_path / "clips")

    assert ingest("clips", "out", beam=beam_options, progress=leave).usable == 8
    assert (tmp_path / "out" / "index.json").is_file()


def test_a_user_error_of_a_worker_is_one_line(clips, tmp_path, beam_options, monkeypatch):
    monkeypatch.syspath_prepend(PROGRAMS)
    monkeypatch.setattr(workers, "MODULE", "mistaken_worker")
    with pytest.raises(UserError, match=r"^nothing works here$"):
        ingest(clips, tmp_path / "out", beam=beam_options)
    assert not (tmp_path / "out").exists()


def test_a_clip_that_changes_after_its_inspection_ends_the_run(clips, tmp_path, beam_options):
    def change(done, total):
        if done == total:
            data = bytearray((clips / "4.mp4").read_bytes())
            data[-20] ^= 1
            (clips / "4.mp4").write_bytes(data)

    with pytest.raises(UserError, match=r"^[^\n]*4\.mp4 has changed since it was inspected\. Start again[^\n]*$"):
        ingest(clips, tmp_path / "out", beam=beam_options, progress=change)
    assert not (tmp_path / "out").exists()
    report = ingest(clips, tmp_path / "out", beam=beam_options)
    assert report.usable + len(report.quarantined) == 9


def test_a_full_disk_ends_the_run_with_advice(clips, tmp_path, beam_options):
    frames = np.random.default_rng(0).integers(0, 255, (1, 256, 256, 3), np.uint8)
    Clip(frames=frames, fps=1).save(clips / "large.png")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        with pytest.raises(UserError, match=r"^[^\n]*out cannot be written \(File too large\); free disk space[^\n]*$"):
            ingest(clips, tmp_path / "out", beam=beam_options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert ingest(clips, tmp_path / "out", beam=beam_options).usable == 9


def test_the_command_runs_a_pipeline_or_explains_its_error(clips, tmp_path, script):
    ended = script("tools/ingest.py", clips, tmp_path / "out", "--beam=--runner=DirectRunner")
    assert ended.code == 0, ended.err
    assert "8 clips, 24 frames" in ended.out
    (tmp_path / "empty").mkdir()
    for source, options, message in [
        (tmp_path / "empty", "", f"error: {tmp_path / 'empty'} holds no clips; "),
        (clips, "--runner=Nonesuch", "error: Apache Beam's pipeline failed (Unexpected pipeline runner: Nonesuch. "),
        (clips, "--direct_num_workers=x", "argument --direct_num_workers: invalid int value: 'x'. Use"),
        (clips, "--job_name='x", "No closing quotation. Close"),
    ]:
        ended = script("tools/ingest.py", source, tmp_path / "none", f"--beam={options}")
        assert ended.code == 2
        assert message in ended.err.splitlines()[-1]
        assert not (tmp_path / "none").exists()
