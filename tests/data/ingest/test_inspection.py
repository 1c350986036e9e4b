"""Files are cut into clips of their own; measures are columns; every microsecond of a file is in one row."""

import io
import itertools

import av
import numpy as np
import pytest

from dit_video.core.errors import UserError
from dit_video.curation.screening import ScreeningConfig
from dit_video.data.clips import ClipSource
from dit_video.data.ingest import inspection
from dit_video.data.ingest.engine import IngestConfig, ingest
from dit_video.data.ingest.formats import list_clips
from dit_video.data.ingest.reencoder import ReencodeConfig
from dit_video.data.tables import Table
from dit_video.video import Clip, decode, encode, probe

HEIGHT, WIDTH, FPS = 96, 128, 10


def film(*seconds: float, fps: float = FPS, seed: int = 0) -> np.ndarray:
    """Return shots of so many seconds; in each one a picture of its own colour drifts sideways."""
    shots = []
    for number, length in enumerate(seconds):
        random = np.random.default_rng([seed, number])
        picture = random.integers(0, 90, (HEIGHT // 8, WIDTH // 8, 3)).repeat(8, 0).repeat(8, 1)
        picture += np.array([160 * (number >> bit & 1) for bit in range(3)])
        shots += [np.roll(picture, index, axis=1) for index in range(round(length * fps))]
    return np.stack(shots).astype(np.uint8)


def add_sound(content: bytes, seconds: float) -> bytes:
    """Return an mp4 with the pictures of this one, and AAC."""
    out = io.BytesIO()
    with av.open(io.BytesIO(content)) as pictures, av.open(out, "w", format="mp4") as target:
        video = target.add_stream_from_template(pictures.streams.video[0])
        sound = target.add_stream("aac", rate=16000, layout="mono")
        for packet in pictures.demux(video=0):
            if packet.size:
                packet.stream = video
                target.mux(packet)
        wave = np.sin(np.arange(int(seconds * 16000)) * 0.2).astype(np.float32)[None]
        frame = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
        frame.rate = 16000
        target.mux(sound.encode(frame))
        target.mux(sound.encode(None))
    return out.getvalue()


def write(folder, **files: bytes):
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.mp4").write_bytes(content)
    return folder


def mp4(frames: np.ndarray, fps: float = FPS) -> bytes:
    return encode(Clip(frames=frames, fps=fps), "mp4")


def with_key_frames(frames: np.ndarray, fps: int = FPS) -> bytes:
    """Return an mp4 with a key frame every second."""
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as file:
        stream = file.add_stream("h264", rate=fps, options={"x264-params": f"keyint={fps}:scenecut=0:crf=1"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode(None))
    return out.getvalue()


@pytest.mark.nightly
def test_kept_shots_take_their_share_of_the_file(tmp_path):
    """10 shots of 40 are kept, which are 20 s of 50."""
    pytest.importorskip("scenedetect")
    lengths = [2 if number % 4 == 1 else 1 for number in range(40)]
    frames = film(*lengths)
    content = with_key_frames(frames)
    clips = write(tmp_path / "clips", a=content)
    config = IngestConfig(screening=ScreeningConfig(shots="content", min_seconds=1.5))
    report = ingest(clips, tmp_path / "out", config=config)
    assert report.methods == {"copy": 10}
    with av.open(io.BytesIO(content)) as file:
        packets = [(float(packet.pts * packet.time_base), packet.size) for packet in file.demux(video=0) if packet.size]
    parts = [sum(size for time, size in packets if 1 <= time - 5 * number < 2.99) for number in range(10)]
    assert 0.3 < sum(parts) / len(content) < 0.6
    assert sum(parts) < report.bytes < 1.2 * sum(parts)
    stored = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.array_record"))
    assert stored < report.bytes + (128 << 10)  # ArrayRecord fills blocks of 64 KiB
    source = ClipSource(tmp_path / "out")
    assert [info.name for info in source.infos] == [f"a.mp4#{number}" for number in range(1, 40, 4)]
    assert max(source.column("length") / parts) < 1.5  # these bytes are read for a clip
    whole, start = decode(content).frames, 1
    for index in range(10):
        clip = decode(source[index]).frames
        np.testing.assert_array_equal(clip, whole[start * FPS : (start + 2) * FPS])
        start += 5


def test_parts_of_a_file_have_its_caption_only_on_request(tmp_path):
    clips = write(tmp_path / "clips", long=mp4(film(3)), short=mp4(film(1, seed=1)))
    for name in ("long", "short"):
        (clips / f"{name}.txt").write_text(f"a {name} film")
    config = IngestConfig(screening=ScreeningConfig(max_clip_seconds=2))
    report = ingest(clips, tmp_path / "out", config=config)
    captions = {"long.mp4#0": (), "long.mp4#1": (), "short.mp4": ("a short film",)}
    assert {info.name: info.captions for info in ClipSource(tmp_path / "out").infos} == captions
    assert report.uncaptioned == 2
    config = IngestConfig(screening=ScreeningConfig(max_clip_seconds=2), inherit_captions=True)
    assert ingest(clips, tmp_path / "out", config=config).uncaptioned == 0  # without decoding
    captions |= {"long.mp4#0": ("a long film",), "long.mp4#1": ("a long film",)}
    assert {info.name: info.captions for info in ClipSource(tmp_path / "out").infos} == captions


def test_long_files_are_cut_into_clips_with_their_sound(tmp_path):
    content = add_sound(mp4(film(5)), 5)
    ingest(
        write(tmp_path / "clips", a=content),
        tmp_path / "out",
        config=IngestConfig(screening=ScreeningConfig(max_clip_seconds=2), max_lead_in=10),
    )
    source = ClipSource(tmp_path / "out")
    assert [(info.name, info.frames) for info in source.infos] == [("a.mp4#0", 17), ("a.mp4#1", 17), ("a.mp4#2", 16)]
    assert source.column("audio_codec") == ["aac"] * 3
    assert source.column("audio_rate").tolist() == [16000] * 3
    assert source.column("audio_channels").tolist() == [1] * 3
    np.testing.assert_allclose(source.column("audio_offset"), 0, atol=0.1)
    whole = decode(content).frames
    clips = [source[index] for index in range(3)]
    np.testing.assert_array_equal(np.concatenate([decode(clip).frames for clip in clips]), whole)
    for clip, info in zip(clips, source.infos, strict=True):
        with av.open(io.BytesIO(clip)) as file:
            (sound,) = file.streams.audio
            assert float(sound.duration * sound.time_base) == pytest.approx(info.frames / FPS, abs=0.15)


@pytest.mark.nightly
def test_measures_are_columns_by_which_clips_are_chosen_afterwards(tmp_path):
    """The condition selects what the limits of an ingest keep."""
    blurred = np.broadcast_to(np.linspace(0, 255, WIDTH).astype(np.uint8)[:, None], (10, HEIGHT, WIDTH, 3)).copy()
    barred = film(1, seed=2)
    barred[:, :20] = barred[:, -20:] = 0
    clips = write(
        tmp_path / "clips",
        barred=mp4(barred),
        blurred=mp4(blurred),
        black=mp4(np.zeros((10, HEIGHT, WIDTH, 3), np.uint8)),
        moving=mp4(film(1)),
        still=mp4(film(1)[:1].repeat(10, axis=0)),
    )
    ingest(clips, tmp_path / "all", config=IngestConfig(screening=ScreeningConfig(measure=True)))
    source = ClipSource(tmp_path / "all")
    assert len(source) == 5
    measures = ("motion", "black", "frozen", "sharpness", "letterbox")
    for name in measures:
        values = source.column(name)
        assert values.dtype == np.float32
        assert np.isfinite(values).all()
    limits = {
        "motion >= 2": ScreeningConfig(min_motion=2),
        "sharpness >= 10 and black <= 0.5": ScreeningConfig(min_sharpness=10, max_black=0.5),
        "not (frozen > 0.5)": ScreeningConfig(max_frozen=0.5),
        "letterbox <= 0.2": ScreeningConfig(max_letterbox=0.2),
    }
    counts = set()
    for number, (where, screening) in enumerate(limits.items()):
        ingest(clips, tmp_path / str(number), config=IngestConfig(screening=screening))
        kept = [info.name for info in ClipSource(tmp_path / str(number)).infos]
        assert [info.name for info in ClipSource(tmp_path / "all", where=where).infos] == kept
        counts.add(len(kept))
    assert counts <= {1, 2, 3, 4}
    with pytest.raises(UserError, match="there is no column contrast"):
        ClipSource(tmp_path / "all", where="contrast > 1")


def test_every_microsecond_is_in_one_row(tmp_path):
    pytest.importorskip("scenedetect")
    fps = 30000 / 1001
    films = {
        "whole": (mp4(film(1.3, seed=1)), 1_300_000),
        "shots": (mp4(film(2, 0.3, 3.1, 0.9, fps=fps), fps), round(189 / fps * 1e6)),
        "again": (mp4(film(2, 0.3, fps=fps), fps), round(69 / fps * 1e6)),
        "small": (mp4(film(0.8, seed=3)[:, :32, :32]), 800_000),
    }
    films["broken"] = (bytes(films["whole"][0]), 1_300_000)
    clips = write(tmp_path / "clips", **{name: content for name, (content, _) in films.items()})
    damaged = bytearray(films["broken"][0])
    start = damaged.index(b"mdat") + 200
    damaged[start : start + 4000] = np.random.default_rng(0).bytes(4000)
    (clips / "broken.mp4").write_bytes(damaged)
    (clips / "text.mp4").write_text("no film")
    screening = ScreeningConfig(shots="content", min_seconds=1, min_size=64, duplicates=4, max_clip_seconds=1.6)
    report = ingest(clips, tmp_path / "out", config=IngestConfig(screening=screening))
    table = Table(tmp_path / "out")
    names, sources = table["name"].to_pylist(), table["source"].to_pylist()
    rows = list(zip(sources, table["start_us"].tolist(), table["duration_us"].tolist(), strict=True))
    for name, (_, duration) in films.items():
        spans = [(start, length) for source, start, length in rows if source == f"{name}.mp4"]
        assert spans[0][0] == 0
        assert all(start + length == following for (start, length), (following, _) in itertools.pairwise(spans))
        assert sum(length for _, length in spans) == pytest.approx(duration, abs=1), name
    assert report.accounts == {
        kind: {"parts": len(lengths), "microseconds": sum(lengths)}
        for kind in ("cut", "dropped", "duplicate", "kept", "unreadable")
        if (lengths := _list_durations(table, kind))
    }
    assert set(report.accounts) == {"cut", "dropped", "duplicate", "kept", "unreadable"}
    assert sum(account["microseconds"] for account in report.accounts.values()) == sum(table["duration_us"])
    assert len(set(table["id"].tolist())) == len(names) == len(set(names))


def _list_durations(table: Table, kind: str) -> list[int]:
    outcome = "kept" if kind == "duplicate" else kind
    where = f"outcome == '{outcome}' and chosen == {kind != 'duplicate'}"
    return table["duration_us"][table.select(where)].tolist()


def test_a_clip_that_is_too_large_for_a_record_is_refused_with_a_fix(tmp_path, monkeypatch):
    clips = write(tmp_path / "clips", large=with_key_frames(film(2, 2)))
    size = (clips / "large.mp4").stat().st_size
    monkeypatch.setattr(inspection, "MAX_CLIP_BYTES", size * 2 // 3)

    def inspect(**limits):
        (tmp_path / "work").mkdir(exist_ok=True)
        config = inspection.InspectionConfig(folder=str(tmp_path / "work"), **limits)
        (clip,) = list_clips(clips).clips
        return inspection.inspect(clip, config)

    fix = "cut it with tools/ingest.py --screening.max-clip-seconds …, or re-encode it with --reencode.max-pixels …"
    assert fix in inspect().reason
    cut = inspect(screening=ScreeningConfig(max_clip_seconds=2))
    assert [outcome.kind for outcome in cut.outcomes] == ["kept", "kept"]
    encoded = inspect(reencode=ReencodeConfig(max_pixels=24 * 32, crf=30))
    assert [outcome.kind for outcome in encoded.outcomes] == ["kept"]


def test_the_facts_of_a_row_are_those_of_the_stored_clip(tmp_path):
    clips = write(tmp_path / "clips", a=mp4(film(2)), b=mp4(film(1, seed=1)))
    screening, reencode = ScreeningConfig(max_clip_seconds=1), ReencodeConfig(max_pixels=48 * 64, fps=5)
    ingest(clips, tmp_path / "out", config=IngestConfig(screening=screening, reencode=reencode))
    source = ClipSource(tmp_path / "out")
    assert [info.name for info in source.infos] == ["a.mp4#0", "a.mp4#1", "b.mp4"]
    for index, info in enumerate(source.infos):
        facts = probe(source[index])
        for name in ("height", "width", "frames"):
            assert getattr(info, name) == getattr(facts, name)
        assert (info.fps, info.seconds) == (pytest.approx(facts.fps), pytest.approx(facts.seconds))
        assert (info.height, info.width, info.frames) == (48, 64, 5)
