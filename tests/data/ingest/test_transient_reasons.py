"""Failures that are no error of the clip: they are retried, counted apart, and inspected again on request."""

import errno
import hashlib
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from dit_video.core.errors import UserError
from dit_video.data.clips import ClipSource
from dit_video.data.ingest import parts, workers
from dit_video.data.ingest.engine import IngestConfig, ingest
from dit_video.data.ingest.formats import ListedClip
from dit_video.data.ingest.inspection import make_failure
from dit_video.data.ingest.parts import make_row
from dit_video.video import Clip
from support.devices import PROGRAMS


def write_clips(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        seed = int.from_bytes(name.encode()[:4], "big")
        frames = np.random.default_rng(seed).integers(0, 255, (3, 32, 32, 3), np.uint8)
        Clip(frames=frames, fps=10).save(folder / name)
    return folder


@pytest.fixture
def log(tmp_path, monkeypatch):
    """Return the file with the names of clips that workers inspected; workers fail as a clip's name says."""
    (tmp_path / "log").mkdir()
    monkeypatch.setenv("DIT_VIDEO_TEST_LOG", str(tmp_path / "log"))
    monkeypatch.syspath_prepend(PROGRAMS)
    monkeypatch.setattr(workers, "MODULE", "interrupted_worker")
    return tmp_path / "log" / "inspected"


def compute_digests(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.slow
def test_transient_failures_are_quarantined_apart_and_retried_on_request(tmp_path, log, monkeypatch):
    monkeypatch.setattr(parts, "_MIN_PART_BYTES", 1)
    clips = write_clips(tmp_path / "clips", "a.mp4", "b_unreadable.mp4", "d.mp4", "f_always_rewritten.mp4")
    (clips / "e_own.mp4").write_bytes(b"broken")
    out = tmp_path / "out"
    report = ingest(clips, out)
    reasons = dict(report.quarantined)
    assert reasons["b_unreadable.mp4"] == "cannot be read (Input/output error), also when tried again alone"
    size = (clips / "f_always_rewritten.mp4").stat().st_size
    assert reasons["f_always_rewritten.mp4"] == (
        f"changed from {size} to {size - 1} bytes since it was listed; leave it alone, also when tried again alone"
    )
    assert list(reasons) == ["b_unreadable.mp4", "e_own.mp4", "f_always_rewritten.mp4"]
    assert report.passing == ("b_unreadable.mp4", "f_always_rewritten.mp4")
    assert log.read_text().split() == ["a.mp4", "d.mp4", "e_own.mp4"]

    before = compute_digests(out)
    log.unlink()
    assert ingest(clips, out).reused  # not unasked
    assert not log.exists()
    again = ingest(clips, out, retry=True)
    assert again.reused
    assert again.passing == report.passing
    assert compute_digests(out) == before
    assert not log.exists()  # neither file could be read

    (log.parent / "mended").touch()
    (clips / "f_always_rewritten.mp4").rename(tmp_path / "f")
    gone = ingest(clips, out, retry=True)
    assert (gone.passing, gone.files, log.read_text().split()) == ((), 4, ["b_unreadable.mp4"])
    log.unlink()
    (tmp_path / "f").rename(clips / "f_always_rewritten.mp4")
    assert ingest(clips, out).passing == ("f_always_rewritten.mp4",)
    last = ingest(clips, out, config=IngestConfig(time_limit=240), retry=True)  # more time is no other data set
    assert (last.reused, last.passing) == (False, ())
    assert log.read_text().split() == ["f_always_rewritten.mp4"]
    names = ["a.mp4", "b_unreadable.mp4", "d.mp4", "f_always_rewritten.mp4"]
    source = ClipSource(out)
    assert [info.name for info in source.infos] == names
    assert [source[index] for index in range(4)] == [(clips / name).read_bytes() for name in names]
    ingest(clips, tmp_path / "undisturbed")
    assert compute_digests(out) == compute_digests(tmp_path / "undisturbed")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clips", "log", "out", "undisturbed"]
    log.unlink()
    assert ingest(clips, out, retry=True).reused  # there is nothing to try
    assert not log.exists()


def test_what_takes_too_much_memory_is_tried_once_more_with_twice_as_much(tmp_path, log):
    clips = write_clips(tmp_path / "clips", "a.mp4", "c_memory.mp4")
    report = ingest(clips, tmp_path / "out")
    reason = "needs more memory to decode than there is, also at 2 times the usual limit"
    assert (report.quarantined, report.passing) == ((("c_memory.mp4", reason),), ())
    assert log.read_text().split() == ["a.mp4", "c_memory.mp4", "c_memory.mp4"]


@pytest.mark.slow
def test_the_clips_of_a_part_are_inspected_again_together(tmp_path, log):
    """A part is written whole."""
    clips = write_clips(tmp_path / "clips", "a.mp4", "b_unreadable.mp4")
    ingest(clips, tmp_path / "out")
    (log.parent / "mended").touch()
    log.unlink()
    assert ingest(clips, tmp_path / "out", retry=True).usable == 2
    assert log.read_text().split() == ["a.mp4", "b_unreadable.mp4"]


@pytest.mark.slow
def test_failures_that_pass_within_the_run_leave_no_trace(tmp_path, log):
    """The disk has an error at the first read, and a file is not complete."""
    clips = write_clips(tmp_path / "clips", "a.mp4", "b_first.mp4", "c_rewritten.mp4")
    report = ingest(clips, tmp_path / "out")
    assert (report.usable, report.quarantined, report.passing) == (3, (), ())
    for name in ("b_first.mp4", "c_rewritten.mp4"):
        assert (log.parent / name).exists()
    ingest(clips, tmp_path / "undisturbed")
    assert compute_digests(tmp_path / "out") == compute_digests(tmp_path / "undisturbed")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clips", "log", "out", "undisturbed"]


def test_a_source_of_only_transient_failures_is_refused(tmp_path, log):
    clips = write_clips(tmp_path / "clips", "a_unreadable.mp4")
    with pytest.raises(UserError, match=r"a_unreadable\.mp4: cannot be read \(Input/output error\).*; fix that"):
        ingest(clips, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clips", "log"]


def test_the_command_reports_transient_failures(tmp_path, log, script):
    clips = write_clips(tmp_path / "clips", "a.mp4", "b_unreadable.mp4")
    ended = script("tools/ingest.py", clips, tmp_path / "out")
    assert ended.code == 0
    assert "1 of them failed for a temporary reason, such as b_unreadable.mp4; run the same command with --retry" in (
        ended.out
    )
    assert "1 file failed for a transient reason" in (tmp_path / "out" / "REPORT.html").read_text()
    (log.parent / "mended").touch()
    ended = script("tools/ingest.py", clips, tmp_path / "out", "--retry")
    assert ended.code == 0
    assert "2 clips, 6 frames" in ended.out
    assert "temporary reason" not in ended.out
    assert "transient" not in (tmp_path / "out" / "REPORT.html").read_text()


@pytest.mark.parametrize(("running", "fix"), [(0, "end other programs"), (2, "use --workers 2")])
def test_a_lack_of_processes_is_reported(tmp_path, monkeypatch, running, fix):
    clips = write_clips(tmp_path / "clips", "a.mp4", "b.mp4", "c.mp4")
    start, started = subprocess.Popen, []

    def refuse(*arguments, **named):
        if len(started) == running:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        started.append(start(*arguments, **named))
        return started[-1]

    monkeypatch.setattr(workers.subprocess, "Popen", refuse)
    monkeypatch.setattr(workers, "_MEGABYTE", 1)
    with pytest.raises(UserError) as raised:
        ingest(clips, tmp_path / "out", workers=3)
    assert f"process {running + 1} of 3 " in str(raised.value)
    assert f"(Resource temporarily unavailable); {fix}" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert all(process.poll() is not None for process in started)


def test_a_file_that_grows_during_two_ingests_has_two_rows():
    rows = []
    for size in (100, 200):
        clip = ListedClip("growing.mp4", (), size, "/source/growing.mp4")
        (outcome,) = make_failure(clip, "changed", transient=True).outcomes
        rows.append(make_row(outcome, None, source=clip.name, source_bytes=clip.size, source_sha256=""))
    assert rows[0]["id"] != rows[1]["id"]
