"""Lost workers, killed runs, full disks: nothing hangs, nothing is done twice, and the result has the same bytes."""

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dit_video.core.errors import UserError
from dit_video.curation.screening import ScreeningConfig
from dit_video.data.clips import ClipSource
from dit_video.data.ingest import completion, engine, parts, report, workers
from dit_video.data.ingest.engine import IngestConfig, ingest
from dit_video.data.ingest.formats import ListedClip
from dit_video.data.ingest.inspection import Inspection, InspectionConfig
from dit_video.video import Clip
from support.devices import HANG, PROGRAMS, wait_until
from support.marks import mark_slow_except


def write_clips(folder: Path, *names: str) -> None:
    folder.mkdir(exist_ok=True)
    for index, name in enumerate(names):
        frames = np.random.default_rng(index).integers(0, 255, (3, 32, 32, 3), np.uint8)
        Clip(frames=frames, fps=10).save(folder / name)
        (folder / name).with_suffix(".txt").write_text(f"clip {index}")


@pytest.fixture
def log(tmp_path, monkeypatch):
    """Return the file into which workers write the names of clips that they inspect."""
    (tmp_path / "log").mkdir()
    monkeypatch.setenv("DIT_VIDEO_TEST_LOG", str(tmp_path / "log"))
    monkeypatch.syspath_prepend(PROGRAMS)
    monkeypatch.setattr(workers, "MODULE", "interrupted_worker")
    monkeypatch.setattr(workers, "_MEGABYTE", 1)
    return tmp_path / "log" / "inspected"


def compute_digests(folder: Path) -> dict[str, str]:
    """Return hashes of all files, but those that a killed process did not complete."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    names = [str(path.relative_to(folder)) for path in files]
    assert all(".partial." in name or name.startswith(".clips-") for name in names if "/." in f"/{name}")
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in zip(names, files, strict=True)
        if "/." not in f"/{name}"
    }


@pytest.mark.slow
def test_lost_workers_name_their_clips(tmp_path, log, monkeypatch):
    # The others may take as long as a busy machine needs.
    monkeypatch.setattr(
        workers, "compute_time_limit", lambda clip, limit, pixels=0: limit if "hang" in clip.name else HANG
    )
    names = ["a.mp4", "b_killed.mp4", "c_once.mp4", "d_crash.mp4", "e_raise.mp4", "f_hang.mp4", "g.mp4"]
    write_clips(tmp_path / "clips", *names)
    report = ingest(tmp_path / "clips", tmp_path / "out", config=IngestConfig(time_limit=3), workers=2)
    assert [info.name for info in ClipSource(tmp_path / "out").infos] == ["a.mp4", "c_once.mp4", "g.mp4"]
    reasons = dict(report.quarantined)
    assert "SIGKILL" in reasons["b_killed.mp4"]
    assert "exit code 7" in reasons["d_crash.mp4"]
    assert reasons["e_raise.mp4"] == "cannot be decoded (ZeroDivisionError: of a decoder, in two lines)"
    assert "takes more than 3" in reasons["f_hang.mp4"]
    assert report.passing == ("b_killed.mp4", "f_hang.mp4")
    inspected = log.read_text().split()
    assert {name: inspected.count(name) for name in names if "hang" not in name} == {
        name: 2 if any(word in name for word in ("killed", "once", "crash")) else 1
        for name in names
        if "hang" not in name
    }


def test_workers_that_cannot_start_end_the_run(tmp_path, monkeypatch):
    write_clips(tmp_path / "clips", "a.mp4")
    monkeypatch.setattr(workers, "MODULE", "no_such_module")
    with pytest.raises(UserError, match="could not start"):
        ingest(tmp_path / "clips", tmp_path / "out")


def test_a_mistake_in_the_screening_ends_the_run(tmp_path, monkeypatch):
    (tmp_path / "mistaken_worker.py").write_text(
        "from dit_video.data.ingest import worker\n"
        "from dit_video.data.ingest.screening import Screening\n"
        "from dit_video.core.errors import UserError\n"
        "def screen(*_):\n"
        "    raise UserError('nothing works here')\n"
        "Screening.screen = screen\n"
        "worker.main()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(workers, "MODULE", "mistaken_worker")
    write_clips(tmp_path / "clips", "a.mp4", "b.mp4")
    with pytest.raises(UserError, match=r"^nothing works here$"):
        ingest(tmp_path / "clips", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["ingest"]


@pytest.mark.slow
def test_a_killed_run_goes_on_and_gives_the_same_bytes(tmp_path, log, monkeypatch):
    monkeypatch.setattr(parts, "_MIN_PART_BYTES", 1)
    names = ["0.mp4", "1.mp4", "2.mp4", "3_held.mp4", "4.mp4", "5.mp4"]
    write_clips(tmp_path / "clips", *names, "broken.mp4")
    (tmp_path / "clips" / "broken.mp4").write_bytes(b"broken")
    clips, out = tmp_path / "clips", tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    run = subprocess.Popen(
        [sys.executable, str(PROGRAMS / "interrupted_ingest.py"), str(clips), str(out)], env=environment
    )
    wait_until(lambda: run.poll() is not None or (log.exists() and len(log.read_text().split()) >= 4))
    assert run.poll() is None
    run.send_signal(signal.SIGKILL)
    run.wait()
    before = log.read_text().split()
    assert 4 <= len(before) < 7
    assert not (out / "table.json").exists()
    seen = []
    ingest(clips, out, workers=1, progress=lambda done, total: seen.append((done, total)))
    assert seen[0] in [(0, 4), (0, 3)]
    inspected = log.read_text().split()
    assert sorted(set(inspected)) == sorted([*names, "broken.mp4"])
    # Only what was in a worker's hands when the run was killed is done again.
    assert len(inspected) <= 7 + 1

    ingest(clips, tmp_path / "one", workers=1)
    ingest(clips, tmp_path / "three", workers=3)
    assert compute_digests(out) == compute_digests(tmp_path / "one") == compute_digests(tmp_path / "three")
    assert {"table.json", "report.json", "features.json", "dataset_info.json"} < compute_digests(out).keys()
    results = [path for path in out.rglob("*") if path.is_file() and path.parent.name != "ingest"]
    assert all(str(tmp_path).encode() not in path.read_bytes() for path in results)


def test_files_that_a_killed_run_left_are_no_part_of_the_result(tmp_path):
    write_clips(tmp_path / "clips", "a.mp4")
    ingest(tmp_path / "clips", tmp_path / "other")
    out = tmp_path / "out"
    left = [".clips-new/half", ".clips-old/half", "index/.train-00000.0.partial.parquet"]
    for name in ("ingest/letter", *left):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("half")
    os.utime(out / ".clips-old", (0, 0))
    (out / "ingest" / "letter").unlink()
    ingest(tmp_path / "clips", out)
    assert compute_digests(out) == compute_digests(tmp_path / "other")
    assert [(out / name).exists() for name in left] == [True, False, False]  # a process may use the first one


@pytest.mark.parametrize("grown", mark_slow_except([True], [False, True]))
@pytest.mark.parametrize(
    "step",
    mark_slow_except(
        ["write_manifest"], ["write_column", "write_metadata", "make_report", "write_document", "write_manifest"]
    ),
)
def test_an_interrupted_completion_is_done_again(tmp_path, monkeypatch, step, grown):
    """The data set of an earlier state of the source stays usable until then."""

    def prepare(out: Path) -> None:
        write_clips(tmp_path / "clips", "a.mp4", "b.mp4")
        if grown:
            ingest(tmp_path / "clips", out)
            write_clips(tmp_path / "clips", "a.mp4", "b.mp4", "c.mp4")

    prepare(tmp_path / "undisturbed")
    for path in (tmp_path / "clips").iterdir():
        path.unlink()
    out = tmp_path / "out"
    prepare(out)

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        module = completion if hasattr(completion, step) else report
        patch.setattr(module, step, interrupt)
        with pytest.raises(KeyboardInterrupt):
            ingest(tmp_path / "clips", out)
    if grown:
        source = ClipSource(out)
        assert [info.name for info in source.infos] == ["a.mp4", "b.mp4"]
        assert source[1] == (tmp_path / "clips" / "b.mp4").read_bytes()
    else:
        assert not (out / "table.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr(engine, "Workers", lambda *_: pytest.fail("decoded again"))
        assert not ingest(tmp_path / "clips", out).reused
    ingest(tmp_path / "clips", tmp_path / "undisturbed")
    assert compute_digests(out) == compute_digests(tmp_path / "undisturbed")


def test_a_clip_that_changed_before_its_part_was_written_is_read_as_it_is_now(tmp_path, log):
    write_clips(tmp_path / "clips", "a.mp4", "b.mp4", "c.mp4")

    def stop(done, total):
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest(tmp_path / "clips", tmp_path / "out", progress=stop)
    changed = (tmp_path / "clips" / "a.mp4").read_bytes() + bytes(9)
    (tmp_path / "clips" / "b.mp4").write_bytes(changed)
    report = ingest(tmp_path / "clips", tmp_path / "out")
    assert (report.usable, report.files, report.quarantined) == (3, 3, ())
    source = ClipSource(tmp_path / "out")
    assert {info.name: source[index] for index, info in enumerate(source.infos)}["b.mp4"] == changed


def test_files_that_somebody_adds_to_the_destination_are_kept(tmp_path):
    write_clips(tmp_path / "clips", "a.mp4")

    def fill(done, total):
        (tmp_path / "out" / "letter.txt").write_text("keep")

    ingest(tmp_path / "clips", tmp_path / "out", progress=fill)
    ingest(tmp_path / "clips", tmp_path / "out")
    assert (tmp_path / "out" / "letter.txt").read_text() == "keep"
    assert len(ClipSource(tmp_path / "out")) == 1


def test_an_inspection_is_the_same_in_another_process(tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (12, 64, 64, 3), np.uint8)
    Clip(frames=frames, fps=4).save(tmp_path / "a.mp4")
    size = (tmp_path / "a.mp4").stat().st_size
    config = ScreeningConfig(min_motion=0, max_letterbox=1, duplicates=6, min_sharpness=0, max_black=1, max_frozen=1)
    with workers.Workers(1, InspectionConfig(screening=config), 60) as processes:
        ((number, verdict),) = processes.inspect([(5, ListedClip("a.mp4", ("x",), size, str(tmp_path / "a.mp4")))])
    assert number == 5
    (outcome,) = verdict.outcomes
    shot = outcome.shot
    assert shot is not None
    assert shot.hash is not None
    assert shot.letterbox is not None
    assert Inspection.from_json(json.loads(json.dumps(verdict.to_json()))) == verdict
    assert type(shot.letterbox).__name__ == "Borders"
    assert (outcome.kind, outcome.name, outcome.start_us, outcome.duration_us) == ("kept", "a.mp4", 0, 3_000_000)
    assert (outcome.payload, outcome.method, outcome.file) == (verdict.sha256, "whole", None)
    assert verdict.sha256 == hashlib.sha256((tmp_path / "a.mp4").read_bytes()).hexdigest()


def tiny_disk(folder: Path) -> bool:
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["disk", "limit"])
def test_a_full_disk_ends_the_run_and_the_next_one_continues(tmp_path, kind):
    """The disk has 100 kB if the user may mount one; otherwise the size of a file is limited."""
    frames = np.random.default_rng(0).integers(0, 255, (1, 256, 256, 3), np.uint8)
    (tmp_path / "clips").mkdir()
    Clip(frames=frames, fps=1).save(tmp_path / "clips" / "a.png")
    assert (tmp_path / "clips" / "a.png").stat().st_size > 150_000
    disk = tmp_path / "disk"
    mounted = kind == "disk" and tiny_disk(disk)
    if kind == "disk" and not mounted:
        pytest.skip("mounting is not allowed")
    disk.mkdir(exist_ok=True)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        if kind == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        with pytest.raises(UserError, match=r"out cannot be written \((No space left|File too large)") as raised:
            ingest(tmp_path / "clips", disk / "out")
        assert "\n" not in str(raised.value)
        assert [path.name for path in disk.iterdir()] == ["out"]
        assert [path.name for path in (disk / "out").iterdir()] == ["ingest"]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        if mounted:
            subprocess.run(["umount", str(disk)], check=True)
    if kind == "limit":
        assert ingest(tmp_path / "clips", disk / "out").usable == 1


def test_the_number_of_processes_follows_from_the_clips():
    clips = [(number, ListedClip(str(number), (), 300_000, "")) for number in range(100)]
    assert workers.count_useful_processes(clips, 4) == 4
    assert workers.count_useful_processes(clips[:2], 4) == 1
    assert workers.count_useful_processes(clips[:8], 4) == 3
    assert workers.compute_time_limit(clips[0][1]._replace(size=1 << 30), 100) == 1100
