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
from dit_video.data.ingest import parts, workers
from dit_video.data.ingest.clusters import make_beam
from dit_video.data.ingest.engine import IngestConfig, ingest
from dit_video.video import Clip
from support.devices import HANG, PROGRAMS

pytest.importorskip("apache_beam")


@pytest.fixture
def beam(monkeypatch):
    """Return what writes parts by a pipeline in this process; parts are of a file each."""
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.runners.portability.fn_api_runner import FnApiRunner

    monkeypatch.setattr(sys, "argv", sys.argv[:1])  # Beam reads them
    monkeypatch.setattr(parts, "_MIN_PART_BYTES", 1)
    return make_beam(FnApiRunner(), PipelineOptions([]))


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


def read_files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("part_bytes", [1 << 30, 20_000, 1])
def test_a_pipeline_writes_the_same_bytes(clips, tmp_path, beam, monkeypatch, part_bytes):
    monkeypatch.setattr(parts, "_MIN_PART_BYTES", part_bytes)
    here = ingest(clips, tmp_path / "here")
    there = ingest(clips, tmp_path / "there", run_parts=beam)
    assert here == there
    files = read_files(tmp_path / "here")
    assert files == read_files(tmp_path / "there")
    count = len([name for name in files if "array_record" in name])
    assert count == {1 << 30: 1, 1: 9}.get(part_bytes, count)
    assert part_bytes != 20_000 or 1 < count < 9
    source = ClipSource(tmp_path / "there")
    assert [source[index] for index in range(8)] == [(clips / info.name).read_bytes() for info in source.infos]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clips", "here", "there"]
    assert ingest(clips, tmp_path / "there", run_parts=beam).reused


def test_a_crash_in_a_decoder_does_not_end_the_pipeline(clips, tmp_path, beam, log):
    (clips / "5.mp4").rename(clips / "5_crash.mp4")
    report = ingest(clips, tmp_path / "out", config=IngestConfig(time_limit=60), run_parts=beam)
    assert [name for name, _ in report.quarantined] == ["3.mp4", "5_crash.mp4"]
    assert report.usable == 7
    assert report.passing == ()


def test_a_killed_pipeline_writes_no_part_again(clips, tmp_path, beam, log):
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
    ingest(clips, tmp_path / "out", run_parts=beam)
    inspected = log.read_text().split()
    assert len(set(inspected)) == 9
    # What was being decoded when it was killed, by each of the pipeline's threads.
    assert len(inspected) <= 9 + (os.cpu_count() or 1)
    ingest(clips, tmp_path / "undisturbed")
    written = {name: content for name, content in read_files(tmp_path / "out").items() if "/." not in f"/{name}"}
    assert written == read_files(tmp_path / "undisturbed")


def test_clips_that_failed_for_transient_reasons_are_retried(clips, tmp_path, beam, log):
    (clips / "4.mp4").rename(clips / "4_unreadable.mp4")
    (clips / "5.mp4").rename(clips / "5_first.mp4")
    report = ingest(clips, tmp_path / "out", run_parts=beam)
    assert report.passing == ("4_unreadable.mp4",)
    assert report.usable == 7
    log.unlink()
    (log.parent / "mended").touch()
    assert ingest(clips, tmp_path / "out", run_parts=beam, retry=True).usable == 8
    assert log.read_text().split() == ["4_unreadable.mp4"]


def test_workers_may_run_in_another_folder(clips, tmp_path, beam, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        os.chdir(tmp_path / "clips")
        beam(*arguments)

    assert ingest("clips", "out", run_parts=run).usable == 8
    assert (tmp_path / "out" / "table.json").is_file()


def test_an_error_of_a_worker_is_one_line(clips, tmp_path, beam, monkeypatch):
    monkeypatch.syspath_prepend(PROGRAMS)
    monkeypatch.setattr(workers, "MODULE", "mistaken_worker")
    with pytest.raises(UserError, match=r"^nothing works here$"):
        ingest(clips, tmp_path / "out", run_parts=beam)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["ingest"]


def test_a_full_disk_ends_the_run_with_advice(clips, tmp_path, beam):
    frames = np.random.default_rng(0).integers(0, 255, (1, 256, 256, 3), np.uint8)
    Clip(frames=frames, fps=1).save(clips / "large.png")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        with pytest.raises(UserError, match=r"^[^\n]*out cannot be written \(File too large\); free disk space[^\n]*$"):
            ingest(clips, tmp_path / "out", run_parts=beam)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert ingest(clips, tmp_path / "out", run_parts=beam).usable == 9


def test_the_command_runs_a_pipeline_or_explains_its_error(clips, tmp_path, script):
    ended = script("tools/ingest.py", clips, tmp_path / "out", "--beam=--runner=DirectRunner")
    assert ended.code == 0, ended.err
    assert "8 clips, 24 frames" in ended.out
    (tmp_path / "empty").mkdir()
    for source, options, message in [
        (tmp_path / "empty", "", f"error: {tmp_path / 'empty'} holds no clips; "),
        (clips, "--runner=Nonesuch", "error: Apache Beam failed (Unexpected pipeline runner: Nonesuch. "),
        (clips, "--direct_num_workers=x", "argument --direct_num_workers: invalid int value: 'x'. Use"),
        (clips, "--job_name='x", "No closing quotation. Close"),
    ]:
        ended = script("tools/ingest.py", source, tmp_path / "none", f"--beam={options}")
        assert ended.code == 2
        assert message in ended.err.splitlines()[-1]
        assert not (tmp_path / "none" / "table.json").exists()
