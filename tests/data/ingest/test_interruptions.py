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
from dit_video.data.clips import ClipSource
from dit_video.data.ingest import workers
from dit_video.data.ingest.engine import IngestConfig, ingest
from dit_video.data.ingest.formats import ListedClip
from dit_video.data.ingest.inspection import Inspection, InspectionConfig
from dit_video.data.ingest.journal import JOURNAL_FILE, PARTS_FOLDER, Journal, JournalPart, read_parts
from dit_video.data.ingest.quality_filter import ScreeningConfig
from dit_video.video import Clip
from support.devices import HANG, PROGRAMS, wait_until


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
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.slow
def test_lost_workers_name_their_clips(tmp_path, log, monkeypatch):
    # The others may take as long as a busy machine needs.
    monkeypatch.setattr(workers, "compute_time_limit", lambda clip, limit: limit if "hang" in clip.name else HANG)
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
        "from dit_video.data.ingest import inspection, worker\n"
        "from dit_video.core.errors import UserError\n"
        "def screen(*_):\n"
        "    raise UserError('nothing works here')\n"
        "inspection.screen = screen\n"
        "worker.main()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(workers, "MODULE", "mistaken_worker")
    write_clips(tmp_path / "clips", "a.mp4", "b.mp4")
    with pytest.raises(UserError, match=r"^nothing works here$"):
        ingest(tmp_path / "clips", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_killed_run_goes_on_and_gives_the_same_bytes(tmp_path, log):
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
    assert not out.exists()
    with (tmp_path / "out.ingest" / JOURNAL_FILE).open("ab") as journal:
        journal.write(b'{"clip": "torn')
    seen = []
    ingest(clips, out, workers=1, progress=lambda done, total: seen.append(done))
    assert seen[0] >= 3
    inspected = log.read_text().split()
    assert sorted(set(inspected)) == sorted([*names, "broken.mp4"])
    # Only what was in a worker's hands when the run was killed is done again.
    assert len(inspected) <= 7 + 1
    assert not (tmp_path / "out.ingest").exists()

    ingest(clips, tmp_path / "one", workers=1)
    ingest(clips, tmp_path / "three", workers=3)
    assert compute_digests(out) == compute_digests(tmp_path / "one") == compute_digests(tmp_path / "three")
    assert {"index.json", "report.json", "features.json", "dataset_info.json"} < compute_digests(out).keys()
    assert all(str(tmp_path).encode() not in path.read_bytes() for path in out.iterdir())


def test_files_that_a_killed_run_left_are_no_part_of_the_result(tmp_path):
    write_clips(tmp_path / "clips", "a.mp4")
    for name in ("data", "data.lists"):
        (tmp_path / "out.ingest" / name).mkdir(parents=True)
        (tmp_path / "out.ingest" / name / "half").write_text("half")
    ingest(tmp_path / "clips", tmp_path / "out")
    ingest(tmp_path / "clips", tmp_path / "other")
    assert compute_digests(tmp_path / "out") == compute_digests(tmp_path / "other")


@pytest.mark.slow
def test_a_changed_clip_is_inspected_again(tmp_path, log):
    write_clips(tmp_path / "clips", "a.mp4", "b.mp4")

    def stop(done, total):
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest(tmp_path / "clips", tmp_path / "out", progress=stop)
    (tmp_path / "clips" / "b.mp4").write_bytes((tmp_path / "clips" / "a.mp4").read_bytes())
    ingest(tmp_path / "clips", tmp_path / "out")
    assert sorted(log.read_text().split()) == ["a.mp4", "b.mp4", "b.mp4"]


@pytest.mark.slow
def test_a_clip_that_changed_without_a_new_modification_time_is_found_out(tmp_path, log):
    """Only the second pass notices it: it forgets the clip's inspection, and the next run continues."""
    write_clips(tmp_path / "clips", "a.mp4", "b.mp4")
    path = tmp_path / "clips" / "b.mp4"

    def change(done, total):
        if done == total:
            stat, data = path.stat(), bytearray(path.read_bytes())
            data[-20] ^= 1
            path.write_bytes(data)
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    with pytest.raises(UserError, match=r"b\.mp4 has changed since it was inspected"):
        ingest(tmp_path / "clips", tmp_path / "out", progress=change)
    report = ingest(tmp_path / "clips", tmp_path / "out")
    assert report.usable + len(report.quarantined) == 2
    assert sorted(log.read_text().split()) == ["a.mp4", "b.mp4", "b.mp4"]


def test_a_destination_that_somebody_fills_meanwhile_is_not_overwritten(tmp_path):
    write_clips(tmp_path / "clips", "a.mp4")

    def fill(done, total):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "letter.txt").write_text("keep")

    with pytest.raises(UserError, match="not an ingested data set"):
        ingest(tmp_path / "clips", tmp_path / "out", progress=fill)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["letter.txt"]


def open_journal(folder, config=ScreeningConfig()):  # noqa: B008
    return Journal(folder, (config, 1.0))


def test_a_journal_returns_the_results_of_unchanged_clips(tmp_path):
    path = tmp_path / "clip"
    path.write_text("x")
    clip = ListedClip("clip", (), 1, str(path))
    verdict = Inspection("", "00", (), (("clip#1", "too short"),), modified=path.stat().st_mtime_ns)
    with open_journal(tmp_path / "work") as journal:
        assert journal.get(clip) is None
        journal.put(clip, verdict)
        with pytest.raises(UserError, match="another process"):
            open_journal(tmp_path / "work")
    with (tmp_path / "work" / JOURNAL_FILE).open("ab") as file:
        file.write(b'not json\n{"clip": 3}\n[]\n{"torn": ')
    with open_journal(tmp_path / "work") as journal:
        assert journal.get(clip) == verdict
        assert journal.get(clip._replace(size=2)) is None
        assert journal.get(clip._replace(name="other")) is None
        journal.put(clip._replace(name="other"), verdict)
    with open_journal(tmp_path / "work") as journal:
        assert journal.get(clip._replace(name="other")) == verdict
    with open_journal(tmp_path / "work", ScreeningConfig(min_size=8)) as journal:
        assert journal.get(clip) is None
        journal.put(clip, verdict)
        journal.forget([clip])
    with open_journal(tmp_path / "work", ScreeningConfig(min_size=8)) as journal:
        assert journal.get(clip) is None
    os.utime(path, ns=(1, 1))
    with open_journal(tmp_path / "work") as journal:
        assert journal.get(clip) is None
        journal.put(clip, verdict._replace(reason="no memory", transient=True, modified=1))
    with open_journal(tmp_path / "work") as journal:
        assert journal.get(clip) is None
        journal.put(clip, verdict._replace(modified=1))
    with open_journal(tmp_path / "work") as journal:
        assert journal.get(clip) == verdict._replace(modified=1)


def test_results_of_workers_are_merged_into_the_journal(tmp_path):
    """A worker's lines are read by its own run, and those that are kept by the next run."""
    clips = []
    for name in ("a", "b", "c"):
        (tmp_path / name).write_text("x")
        clips.append(ListedClip(name, (), 1, str(tmp_path / name)))
    verdicts = [Inspection("", name, modified=(tmp_path / name).stat().st_mtime_ns) for name in ("a", "b")]
    failed = Inspection("cannot be read", transient=True)
    with open_journal(tmp_path / "work") as journal:
        parts = [JournalPart(tmp_path / "work", journal.settings) for _ in range(2)]
        parts[0].put(clips[0], verdicts[0])
        parts[1].put(clips[1], failed)
        assert read_parts(tmp_path / "work", journal.settings, clips) == [verdicts[0], failed, None]
        parts[0].put(clips[1], verdicts[1])
    with next((tmp_path / "work" / PARTS_FOLDER).iterdir()).open("ab") as file:
        file.write(b'{"clip": "torn')
    with open_journal(tmp_path / "work") as journal:
        assert [journal.get(clip) for clip in clips] == [*verdicts, None]
    assert list((tmp_path / "work" / PARTS_FOLDER).iterdir()) == []
    with open_journal(tmp_path / "work") as journal:
        assert [journal.get(clip) for clip in clips] == [*verdicts, None]


def test_an_inspection_is_the_same_after_the_journal(tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (12, 64, 64, 3), np.uint8)
    Clip(frames=frames, fps=4).save(tmp_path / "a.mp4")
    size = (tmp_path / "a.mp4").stat().st_size
    config = ScreeningConfig(min_motion=0, max_letterbox=1, duplicates=6, min_sharpness=0, max_black=1, max_frozen=1)
    with workers.Workers(1, InspectionConfig(screening=config), 60) as processes:
        ((number, verdict),) = processes.inspect([(5, ListedClip("a.mp4", ("x",), size, str(tmp_path / "a.mp4")))])
    assert number == 5
    (shot,) = verdict.shots
    assert shot.hash is not None
    assert shot.letterbox is not None
    assert Inspection.from_json(json.loads(json.dumps(verdict.to_json()))) == verdict
    assert type(shot.letterbox).__name__ == "Borders"


def tiny_disk(folder: Path) -> bool:
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


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
        assert [path.name for path in disk.iterdir()] == ["out.ingest"]
        assert [path.name for path in (disk / "out.ingest").iterdir()] == [JOURNAL_FILE]
        assert len((disk / "out.ingest" / JOURNAL_FILE).read_text().splitlines()) == 1
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
