"""Damaged clips: each is accounted for, with a reason, and the rest becomes a data set."""

import io
import tarfile
from pathlib import Path

import av
import numpy as np
import pytest

from dit_video.core import rng
from dit_video.core.errors import UserError
from dit_video.data.clips import ClipSource
from dit_video.data.ingest.engine import IngestConfig, ingest
from dit_video.data.ingest.report import IngestReport
from dit_video.video import Clip, decode, encode

SHARED = Path(__file__).parents[4] / "shared" / "clips"


def clip(frames: int = 24, height: int = 48, width: int = 64, seed: int = 0) -> Clip:
    pixels = rng.make_generator(seed, "test clip").integers(0, 255, (frames, height // 8, width // 8, 3), np.uint8)
    return Clip(frames=pixels.repeat(8, 1).repeat(8, 2), fps=12)


def audio_only() -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def with_count(encoded: bytes, box: bytes, offset: int, count: int = 10**9) -> bytes:
    """Return an mp4 whose table of samples claims to have so many."""
    start = encoded.index(box) + offset
    return encoded[:start] + count.to_bytes(4, "big") + encoded[start + 4 :]


def with_noise(encoded: bytes) -> bytes:
    """Return a file with the middle fifth of the pictures' bytes replaced."""
    start = encoded.index(b"mdat") + 4
    first, length = start + (len(encoded) - start) * 2 // 5, (len(encoded) - start) // 5
    noise = rng.make_generator(0, "noise").bytes(length)
    return encoded[:first] + noise + encoded[first + length :]


def accounted(report: IngestReport) -> int:
    return report.usable_files + len(report.quarantined) + len(report.dropped_files) + len(report.rejected)


def test_damaged_files_are_quarantined_with_reasons(tmp_path):
    whole = encode(clip(), "mp4")
    files = {
        "truncated.mp4": whole[: len(whole) // 2],
        "empty.mp4": b"",
        "text.mp4": b"this is no video\n" * 40,
        "audio.mp4": audio_only(),
        "promises_times.mp4": with_count(whole, b"stts", 12),
        "promises_sizes.mp4": with_count(whole, b"stsz", 12),
        "noise.mp4": with_noise(whole),
        "one_frame.mp4": encode(clip(1), "mp4"),
        "wide.png": encode(Clip(frames=np.zeros((1, 2, 60_000, 3), np.uint8), fps=1), "png"),
        "whole.mp4": whole,
    }
    folder = tmp_path / "clips"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / "whole.txt").write_text("word " * 2000)
    (folder / "one_frame.txt").write_text(" \n")
    report = ingest(folder, tmp_path / "out", config=IngestConfig(time_limit=60))
    assert report.files == accounted(report) == len(files)
    reasons = dict(report.quarantined)
    unreadable = "is not a readable video or image"
    expected = {
        "truncated.mp4": unreadable,
        "empty.mp4": unreadable,
        "text.mp4": unreadable,
        "promises_sizes.mp4": unreadable,
        "audio.mp4": "no readable video stream",
        "noise.mp4": "is damaged after 0.",
    }
    assert reasons.keys() == expected.keys()
    assert [name for name, part in expected.items() if part not in reasons[name]] == []
    assert not any("\n" in reason for reason in reasons.values())
    assert sorted(report.reasons["quarantined"].values()) == [1, 1, 4]
    infos = {info.name: info for info in ClipSource(tmp_path / "out").infos}
    assert infos.keys() == {"one_frame.mp4", "wide.png", "whole.mp4", "promises_times.mp4"}
    # What promises a billion frames is taken for what it holds.
    assert [infos[name].frames for name in ("promises_times.mp4", "whole.mp4", "one_frame.mp4")] == [24, 24, 1]
    assert (infos["wide.png"].height, infos["wide.png"].width) == (2, 60_000)
    assert infos["whole.mp4"].caption == ("word " * 2000).strip()
    assert (report.uncaptioned, infos["one_frame.mp4"].captions) == (3, ())


def test_bad_entries_of_tars_are_rejected(tmp_path):
    """Entries outside of the tar and duplicate names are rejected; the rest is read in place."""
    content = {name: encode(clip(2, seed=index), "mp4") for index, name in enumerate(["a", "b", "c"])}
    with tarfile.open(tmp_path / "clips.tar", "w") as tar:
        for name, data in [
            ("a.mp4", content["a"]),
            ("a.txt", b"first"),
            ("../b.mp4", content["b"]),
            ("/b.mp4", content["b"]),
            ("c.mp4", content["c"]),
            ("c.mp4", content["b"]),
            ("d.mp4", b"broken"),
        ]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    report = ingest(tmp_path / "clips.tar", tmp_path / "out")
    source = ClipSource(tmp_path / "out")
    assert report.format == "webdataset"
    assert report.files == accounted(report) == 6  # a.txt is no entry of its own
    assert report.rejected == (
        ("../b.mp4", "its path lies outside of the tar"),
        ("/b.mp4", "its path lies outside of the tar"),
        ("c.mp4", "another entry before it has the same name"),
    )
    assert [name for name, _ in report.quarantined] == ["d.mp4"]
    assert [info.captions for info in source.infos] == [("first",), ()]
    stored = {info.name: source[index] for index, info in enumerate(source.infos)}
    assert stored == {"a.mp4": content["a"], "c.mp4": content["c"]}


def test_bad_rows_of_lists_are_rejected(tmp_path):
    """Every row that cannot be used is counted by its line; the others are a data set."""
    folder = tmp_path / "clips"
    folder.mkdir()
    for name in ("a", "b", "c"):
        (folder / f"{name}.mp4").write_bytes(encode(clip(2), "mp4"))
    (folder / "d.mp4").write_bytes(b"broken")
    rows = [
        b"file_name,text",
        b"a.mp4,first",
        b",names no file",
        b"gone.mp4,x",
        b"b.mp4,\xe9",
        b"c.mp4,x,y",
        b"d.mp4,x",
        b"a.mp4,second",
    ]
    (folder / "metadata.csv").write_bytes(b"\n".join(rows))
    report = ingest(folder, tmp_path / "out")
    assert report.files == accounted(report) == 6
    assert [name for name, _ in report.quarantined] == ["d.mp4"]
    lines = ["metadata.csv, line 3", "metadata.csv, line 6"]
    assert [name for name, _ in report.rejected] == [*lines, "gone.mp4", "b.mp4"]
    assert len(report.reasons["rejected"]) == 4
    assert report.unlisted == ("c.mp4",)
    assert [(info.name, info.captions) for info in ClipSource(tmp_path / "out").infos] == [
        ("a.mp4", ("first", "second"))
    ]
    assert IngestReport.read(tmp_path / "out") == report


def test_a_file_with_the_name_of_anothers_shot_is_refused(tmp_path):
    pytest.importorskip("scenedetect")
    from dit_video.curation.screening import ScreeningConfig

    frames = np.concatenate([np.full((12, 48, 64, 3), 20, np.uint8), np.full((12, 48, 64, 3), 220, np.uint8)])
    folder = tmp_path / "clips"
    folder.mkdir()
    (folder / "a.mp4").write_bytes(encode(Clip(frames=frames, fps=12), "mp4"))
    config = IngestConfig(screening=ScreeningConfig(shots="content"))
    report = ingest(folder, tmp_path / "out", config=config)
    source = ClipSource(tmp_path / "out")
    assert [(i.name, i.frames) for i in source.infos] == [("a.mp4#0", 12), ("a.mp4#1", 12)]
    whole = decode(folder / "a.mp4").frames
    np.testing.assert_array_equal(np.concatenate([decode(source[index]).frames for index in range(2)]), whole)
    assert (report.usable, report.usable_files, report.files) == (2, 1, 1)
    (folder / "a.mp4#1").write_bytes(encode(Clip(frames=frames[:12], fps=12), "mp4"))
    (folder / "clips.csv").write_text("path,text\na.mp4,x\na.mp4#1,y\n")
    with pytest.raises(UserError, match=r"two clips would be called a\.mp4#1; rename the file"):
        ingest(folder / "clips.csv", tmp_path / "other", config=config)
    assert not (tmp_path / "other" / "table.json").exists()
    (folder / "a.mp4#1").rename(folder / "b.mp4")
    (folder / "clips.csv").write_text("path,text\na.mp4,x\nb.mp4,y\n")
    report = ingest(folder / "clips.csv", tmp_path / "other", config=config)
    assert (report.usable, report.files) == (3, 2)


def mutate(encoded: bytes, other: bytes, seed: int) -> bytes:
    """Flip bytes, cut out a piece, cut off the end, insert a piece of another file, or put noise over a piece."""
    generator = rng.make_generator(seed, "mutation")
    data = bytearray(encoded)
    for _ in range(int(generator.integers(1, 4))):
        offset = int(generator.integers(0, len(data)))
        length = int(generator.integers(1, max(2, min(len(data) - offset, 1 + len(data) // 4))))
        match int(generator.integers(0, 5)):
            case 0:
                for place in generator.integers(0, len(data), int(generator.integers(1, 40))):
                    data[place] ^= 1 << int(generator.integers(0, 8))
            case 1:
                del data[offset : offset + length]
            case 2:
                del data[max(offset, 8) :]
            case 3:
                start = int(generator.integers(0, len(other)))
                data[offset:offset] = other[start : start + length]
            case _:
                data[offset : offset + length] = generator.bytes(len(data[offset : offset + length]))
        data = data or bytearray(b"\0")
    return bytes(data)


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_mutated_clips_are_all_accounted_for(tmp_path, count):
    """Nothing crashes, hangs or is lost, for rendered clips and for real ones if they are next to the checkout."""
    originals = {f"{format}.{format}": encode(clip(), format) for format in ("mp4", "webm", "gif", "webp", "apng")}
    originals["png.png"] = encode(clip(1), "png")
    for path in sorted(SHARED.glob("*")):
        if path.suffix in (".mp4", ".mkv", ".webm") and path.stat().st_size < 180_000:
            originals[path.name] = path.read_bytes()
    names = sorted(originals)
    folder = tmp_path / "clips"
    folder.mkdir()
    for number in range(count):
        name, other = names[number % len(names)], names[number * 7 % len(names)]
        mutated = mutate(originals[name], originals[other], number)
        (folder / f"{number:04}_{name}").write_bytes(mutated)
    (folder / "whole.mp4").write_bytes(originals["mp4.mp4"])
    report = ingest(folder, tmp_path / "out", config=IngestConfig(time_limit=60), workers=2)
    assert report.files == accounted(report) == count + 1
    assert 0 < len(report.quarantined) < count
    source = ClipSource(tmp_path / "out")
    assert report.usable == len(source.infos) == report.usable_files
    for index, info in enumerate(source.infos):
        assert source[index] == (folder / info.name).read_bytes()
        assert min(info.height, info.width, info.frames) >= 1
        assert 0 < info.fps < float("inf")
        assert 0 <= info.seconds < float("inf")


def test_a_source_without_usable_clips_is_refused_with_the_first_reason(tmp_path):
    (tmp_path / "clips").mkdir()
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / "clips" / name).write_bytes(b"")
    with pytest.raises(UserError, match=r"none of the 2 clips .* \(first: a\.mp4: "):
        ingest(tmp_path / "clips", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["clips"]
    (tmp_path / "clips" / "metadata.csv").write_text("file_name,title\na.mp4,x\n")
    with pytest.raises(UserError, match="no column text"):
        ingest(tmp_path / "clips", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["clips"]
