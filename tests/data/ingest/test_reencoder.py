"""Reencoded files: their choice, sizes and video infos, the same however the run proceeds."""

import dataclasses
import hashlib
import io
import json
from pathlib import Path

import av
import numpy as np
import pytest

from dit_video.apps.reports.ingest_report import write_ingest_report
from dit_video.core.errors import DecodeError, UserError
from dit_video.curation.screening import ScreeningConfig
from dit_video.data.clips import ClipSource
from dit_video.data.ingest import inspection, parts
from dit_video.data.ingest.engine import IngestConfig, ingest
from dit_video.data.ingest.formats import ListedClip, list_clips
from dit_video.data.ingest.inspection import InspectionConfig, inspect
from dit_video.data.ingest.reencoder import ReencodeConfig
from dit_video.data.ingest.report import IngestReport
from dit_video.data.tables import Table
from dit_video.tokens import Grid
from dit_video.video import Clip, decode, encode, probe
from dit_video.video.encode import TimedPicture, encode_jpeg, encode_timed

LIMITS = ReencodeConfig(max_pixels=48 * 64, fps=8, crf=10)


def smooth(frames: int, height: int, width: int) -> np.ndarray:
    """Return frames of moving waves."""
    y, x = np.meshgrid(np.arange(height) / height, np.arange(width) / width, indexing="ij")
    waves = [
        np.stack([np.sin(6 * x + channel + 0.3 * frame) + np.cos(4 * y - channel) for channel in range(3)], axis=-1)
        for frame in range(frames)
    ]
    return (128 + 50 * np.stack(waves)).astype(np.uint8)


def turned(encoded: bytes) -> bytes:
    """Return the file with metadata that turns its display by 90°."""
    out = io.BytesIO()
    with av.open(io.BytesIO(encoded)) as source, av.open(out, "w", format="mp4") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        stream.set_display_rotation(90)
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    return out.getvalue()


def sources() -> dict[str, bytes]:
    varying = [0.0, 0.1, 0.5, 0.55, 2.0]
    return {
        "anim.gif": encode(Clip(frames=smooth(4, 96, 128), fps=5), "gif"),
        "fast.mp4": encode(Clip(frames=smooth(24, 48, 64), fps=24), "mp4"),
        "large.mp4": encode(Clip(frames=smooth(6, 192, 256), fps=8), "mp4"),
        "odd.webm": encode(Clip(frames=smooth(3, 75, 133), fps=8), "webm"),
        "photo.jpg": encode_jpeg(smooth(1, 200, 100)[0]),
        "picture.png": encode(Clip(frames=smooth(1, 200, 100), fps=1), "png"),
        "small.jpg": encode_jpeg(smooth(1, 40, 60)[0]),
        "small.mp4": encode(Clip(frames=smooth(6, 48, 64), fps=8), "mp4"),
        "upright.mp4": turned(encode(Clip(frames=smooth(6, 96, 128), fps=8), "mp4")),
        "varying.mp4": encode_timed(
            [TimedPicture(time, 0.5, picture) for time, picture in zip(varying, smooth(5, 96, 128), strict=True)],
            3,
            crf=10,
        ),
    }


KEPT = {"small.jpg", "small.mp4"}


@pytest.fixture(scope="module")
def reencoded(tmp_path_factory) -> tuple[Path, IngestReport]:
    root = tmp_path_factory.mktemp("reencoding")
    (root / "clips").mkdir()
    for name, content in sources().items():
        (root / "clips" / name).write_bytes(content)
    return root, ingest(root / "clips", root / "data", config=IngestConfig(reencode=LIMITS), workers=2)


def test_files_beyond_a_limit_are_reencoded(reencoded):
    root, _ = reencoded
    source = ClipSource(root / "data")
    stored = {info.name: (source[index], info) for index, info in enumerate(source.infos)}
    before = sources()
    assert stored.keys() == before.keys()
    assert {name for name, (content, _) in stored.items() if content == before[name]} == KEPT
    assert {name: (info.height, info.width, info.frames) for name, (_, info) in stored.items()} == {
        "anim.gif": (48, 64, 4),
        "fast.mp4": (48, 64, 8),
        "large.mp4": (48, 64, 6),
        "odd.webm": (40, 70, 3),
        "photo.jpg": (78, 39, 1),
        "picture.png": (78, 39, 1),
        "small.jpg": (40, 60, 1),
        "small.mp4": (48, 64, 6),
        "upright.mp4": (64, 48, 6),
        "varying.mp4": (48, 64, 5),
    }
    codecs = {name: probe(content).codec for name, (content, _) in stored.items()}
    images = {"photo.jpg": "mjpeg", "small.jpg": "mjpeg", "picture.png": "png"}
    assert codecs == {name: images.get(name, "h264") for name in stored}
    for name, (content, info) in stored.items():
        facts = probe(content)
        assert (info.fps, info.seconds) == (pytest.approx(facts.fps), pytest.approx(facts.seconds)), name
        fps = 8 if name == "fast.mp4" else None
        expected = decode(before[name], size=Grid(info.frames, info.height, info.width), fps=fps).frames
        errors = ((decode(content).frames.astype(float) - expected) ** 2).mean(axis=(1, 2, 3))
        assert errors.max() < 255**2 / 10**3.6, name  # 36 dB
    times: list[float] = []
    probe(stored["varying.mp4"][0], on_frame=lambda time, _: times.append(time))
    assert times == pytest.approx([0.0, 0.1, 0.5, 0.55, 2.0], abs=1e-5)
    assert (
        decode(stored["picture.png"][0]).frames.tobytes()
        == decode(before["picture.png"], size=Grid(1, 78, 39)).frames.tobytes()
    )


def test_reencoded_files_are_recorded(reencoded):
    root, report = reencoded
    before = sources()
    source = ClipSource(root / "data")
    sizes = {info.name: len(source[index]) for index, info in enumerate(source.infos)}
    assert (report.files, report.usable, report.methods) == (10, 10, {"encode": 8, "whole": 2})
    assert report.bytes == sum(sizes.values())
    assert report.settings["reencode"] == dataclasses.asdict(LIMITS)
    assert "8 clips were re-encoded" in write_ingest_report(root / "data").read_text(encoding="utf-8")
    table = Table(root / "data")
    rows = zip(*(table[name].to_pylist() for name in ("name", "method", "source_sha256", "payload")), strict=True)
    for row, (name, method, sha256, payload) in enumerate(rows):
        assert method == ("whole" if name in KEPT else "encode")
        assert table["source_bytes"][row] == len(before[name])
        assert sha256 == hashlib.sha256(before[name]).hexdigest()
        assert (payload == sha256) == (name in KEPT)
    for index, payload in enumerate(source.column("payload")):
        assert payload == hashlib.sha256(source[index]).hexdigest()


def read_files(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "REPORT.html"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_the_same_bytes_however_many_processes(reencoded, tmp_path):
    root, report = reencoded
    again = ingest(root / "clips", tmp_path / "again", config=IngestConfig(reencode=LIMITS), workers=1)
    assert again == report
    assert read_files(tmp_path / "again") == read_files(root / "data")


def test_other_options_make_another_data_set(reencoded):
    root, _ = reencoded
    assert ingest(root / "clips", root / "data", config=IngestConfig(reencode=LIMITS)).reused
    for other in (ReencodeConfig(), dataclasses.replace(LIMITS, crf=11), ReencodeConfig(max_pixels=48 * 64)):
        with pytest.raises(UserError, match="holds another data set"):
            ingest(root / "clips", root / "data", config=IngestConfig(reencode=other))


@pytest.mark.nightly
def test_clips_that_are_not_stored_yet_take_the_room_of_a_part(tmp_path, monkeypatch):
    """They lie in the data set's folder until their part is written."""
    monkeypatch.setattr(parts, "_MIN_PART_BYTES", 1)
    monkeypatch.setattr(parts, "_MAX_PART_FILES", 2)
    monkeypatch.setattr(parts, "_PARTS_PER_SET", 1)
    (tmp_path / "clips").mkdir()
    for number in range(8):
        (tmp_path / "clips" / f"{number}.mp4").write_bytes(sources()["large.mp4"])
    sizes: list[int] = []

    def measure(done: int, total: int) -> None:
        sizes.append(sum(path.stat().st_size for path in (tmp_path / "out").glob(".clips-*/*")))

    config = IngestConfig(reencode=ReencodeConfig(max_pixels=48 * 64))
    ingest(tmp_path / "clips", tmp_path / "out", config=config, progress=measure, workers=1)
    (clip,) = set(Table(tmp_path / "out")["payload_bytes"])
    assert len(list((tmp_path / "out").glob("*.array_record"))) == 4
    assert 2 * clip <= max(sizes) <= 3 * clip
    assert not list((tmp_path / "out").glob(".clips-*"))


def test_shots_are_reencoded_each_by_itself(tmp_path):
    pytest.importorskip("scenedetect")
    levels = [20, 220, 60, 240]
    lengths = [13, 17, 12, 30]  # of 24 frames a second
    frames = np.concatenate(
        [np.full((n, 96, 128, 3), level, np.uint8) for level, n in zip(levels, lengths, strict=True)]
    )
    content = encode(Clip(frames=frames, fps=24), "mp4")
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.mp4").write_bytes(content)
    screening = ScreeningConfig(shots="content", max_letterbox=1)
    for fps, counts in ((None, lengths), (8, [5, 6, 4, 10])):
        config = IngestConfig(screening=screening, reencode=ReencodeConfig(max_pixels=48 * 64, fps=fps))
        report = ingest(tmp_path / "clips", tmp_path / f"out{fps}", config=config)
        source = ClipSource(tmp_path / f"out{fps}")
        assert (report.usable, report.usable_files, report.methods) == (4, 1, {"encode": 4})
        assert (source.column("start_us") / 1e6).tolist() == pytest.approx([0, 13 / 24, 30 / 24, 42 / 24], abs=1e-4)
        assert [info.frames for info in source.infos] == counts
        for index, (info, level) in enumerate(zip(source.infos, levels, strict=True)):
            assert (info.height, info.width) == (48, 64)
            frames = decode(source[index]).frames
            assert frames.shape == (info.frames, 48, 64, 3)
            assert np.abs(frames.astype(int) - level).max() <= 3


def test_a_shot_between_two_sampling_times_has_its_first_frame(tmp_path):
    pytest.importorskip("scenedetect")
    frames = np.concatenate([np.full((n, 48, 64, 3), level, np.uint8) for n, level in ((13, 20), (6, 220), (24, 90))])
    (tmp_path / "a.mp4").write_bytes(encode(Clip(frames=frames, fps=24), "mp4"))
    screening = ScreeningConfig(shots="content", min_shot=0.2)
    config = IngestConfig(screening=screening, reencode=ReencodeConfig(fps=1))
    report = ingest(tmp_path, tmp_path.with_name("out"), config=config)
    assert report.dropped == ()
    source = ClipSource(tmp_path.with_name("out"))
    assert [(info.name, info.frames) for info in source.infos] == [("a.mp4#0", 1), ("a.mp4#1", 1), ("a.mp4#2", 1)]
    assert [int(decode(source[index]).frames.mean()) for index in range(3)] == pytest.approx([20, 220, 90], abs=3)


def one(folder: Path, name: str, content: bytes) -> ListedClip:
    (folder / name).write_bytes(content)
    return next(clip for clip in list_clips(folder).clips if clip.name == name)


def test_files_that_cannot_be_reencoded_are_quarantined(tmp_path, monkeypatch):
    config = InspectionConfig(reencode=ReencodeConfig(max_pixels=1000), folder=str(tmp_path / "anew"))
    wide = one(tmp_path, "wide.png", encode(Clip(frames=np.zeros((1, 2, 60_000, 3), np.uint8), fps=1), "png"))
    assert inspect(wide, config).reason == "frames of 2x60000 cannot be shrunk to 1000 pixels at their aspect ratio"
    large = one(tmp_path, "large.mp4", encode(Clip(frames=smooth(2, 64, 64), fps=8), "mp4"))
    assert inspect(large, config).reason == ""

    def fails(*_: object, **__: object) -> bytes:
        raise RuntimeError("no\nmore")

    monkeypatch.setattr(inspection, "cut_clips", fails)
    failed = inspect(large, config)
    assert failed.reason == "cannot be decoded (RuntimeError: no more)"
    assert failed.outcomes[0].duration_us == 250_000  # as its header says


def test_a_folder_that_cannot_be_written_ends_the_run(tmp_path):
    """A full disk is no error of the clip."""
    large = one(tmp_path, "large.mp4", encode(Clip(frames=smooth(2, 64, 64), fps=8), "mp4"))
    (tmp_path / "file").write_bytes(b"")
    config = InspectionConfig(reencode=ReencodeConfig(max_pixels=1000), folder=str(tmp_path / "file" / "anew"))
    with pytest.raises(UserError, match=r"anew.* cannot be written \(Not a directory\)"):
        inspect(large, config)


@pytest.mark.parametrize(
    ("size", "most", "step", "expected"),
    [
        ((2160, 3840), 360 * 640, 2, (360, 640)),
        ((3840, 2160), 360 * 640, 2, (640, 360)),
        ((1080, 1920), 480 * 854, 2, (480, 854)),
        ((100, 100), 99 * 99, 2, (98, 98)),
        ((100, 100), 99 * 99, 1, (99, 99)),
        ((481, 855), None, 2, (480, 854)),
        ((75, 133), None, 2, (74, 132)),
        ((75, 133), None, 1, (75, 133)),
    ],
)
def test_sizes_fit_the_limit_and_the_step(size, most, step, expected):
    assert ReencodeConfig(max_pixels=most).fit_size(*size, step) == expected


def test_sizes_keep_their_shape():
    generator = np.random.default_rng(0)
    for _ in range(500):
        height, width, most = (int(value) for value in generator.integers((64, 64, 4096), (4000, 4000, 400_000)))
        fitted = ReencodeConfig(max_pixels=most).fit_size(height, width, 2)
        scale = max(fitted) / max(height, width)
        assert fitted[0] * fitted[1] <= most
        assert all(side % 2 == 0 for side in fitted)
        assert abs(min(fitted) - min(height, width) * scale) <= 2
        larger = (min(fitted) + 2) / min(fitted)  # the next even size
        assert fitted[0] * fitted[1] * larger**2 > min(most, height * width) * 0.97


@pytest.mark.parametrize("wrong", [{"max_pixels": 3}, {"fps": 0}, {"fps": float("inf")}, {"crf": -1}, {"crf": 52}])
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        ReencodeConfig(**wrong)


def test_files_that_would_become_too_narrow_are_refused():
    with pytest.raises(DecodeError, match="at their aspect ratio"):
        ReencodeConfig(max_pixels=1000).fit_size(4, 4000, 2)


def test_an_inspection_is_the_same_in_another_process(tmp_path):
    large = one(tmp_path, "large.mp4", encode(Clip(frames=smooth(2, 64, 64), fps=8), "mp4"))
    verdict = inspect(large, InspectionConfig(reencode=ReencodeConfig(max_pixels=1000), folder=str(tmp_path / "anew")))
    (outcome,) = verdict.outcomes
    assert outcome.file is not None
    assert hashlib.sha256(Path(outcome.file).read_bytes()).hexdigest() == outcome.payload
    assert type(verdict).from_json(json.loads(json.dumps(verdict.to_json()))) == verdict
