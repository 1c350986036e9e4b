"""Files of emoji: fetched, found, and made into clips."""

import csv
import os
import shutil
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from dit_video.core.errors import UserError
from dit_video.data.clips import ClipSource
from dit_video.data.ingest.engine import ingest
from dit_video.emoji import source as source_module
from dit_video.emoji.source import PACKAGES, SIDE, count_intervals, fetch, find_files, prepare, write_columns
from dit_video.video import decode
from tests.support.drawn_emoji import STEMS, draw_emoji, write_emoji

pytest.importorskip("emoji")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return write_emoji(tmp_path_factory.mktemp("drawn"))


@pytest.fixture(scope="module")
def prepared(drawn, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    done = []
    files = find_files(drawn, drawn)
    preparation = prepare(files, folder, seed=0, workers=0, progress=lambda *counts: done.append(counts))
    assert done[-1] == (len(STEMS), len(STEMS))
    return folder, preparation


def test_clips_loop_and_keep_their_transparency(prepared):
    folder, preparation = prepared
    assert not preparation.damaged
    assert not preparation.unknown
    for stem in STEMS:
        frames, seconds = draw_emoji(stem)
        clip = decode(folder / f"{stem}.webp", background=(255, 255, 255))
        expected = 1 if len(frames) == 1 else 1 + count_intervals(seconds)
        assert clip.frames.shape == (expected, SIDE, SIDE, 3)
        assert (clip.frames[:, 0, 0] == 255).all()
        if expected > 1:
            assert clip.fps == 8
            np.testing.assert_array_equal(clip.frames[0], clip.frames[-1])
            half = np.asarray(Image.fromarray(frames[len(frames) // 2]).resize((SIDE, SIDE), Image.Resampling.BOX))
            opaque = half[..., 3] == 255
            difference = clip.frames[expected // 2].astype(int) - half[..., :3]
            assert np.abs(difference[opaque]).mean() < 3


def test_the_list_of_clips_has_captions_and_splits(prepared):
    folder, preparation = prepared
    with (folder / "metadata.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["file_name"] for row in rows] == [f"{stem}.webp" for stem in sorted(STEMS)]
    assert {row["text"] for row in rows} >= {"woman firefighter: dark skin tone", "red heart"}
    held_out = {row["file_name"].removesuffix(".webp") for row in rows if row["split"] == "validation"}
    assert held_out == set(preparation.held_out)
    assert set(preparation.held_out.values()) == {"tone", "person"}
    assert "MIT" in (folder / "LICENCE.txt").read_text()


def test_a_data_set_has_the_parts_of_names_and_captions_of_each_language(prepared, tmp_path):
    folder, preparation = prepared
    data = tmp_path / "data"
    ingest(folder, data)
    write_columns(data, preparation)
    clips = ClipSource(data, captions={"captions": 0.5, "captions_de": 0.5})
    assert len(clips) == len(STEMS)
    assert all(clips.column("transparent"))
    captions = dict(zip(clips.column("name"), clips.column("captions"), strict=True))
    expected = ("woman firefighter: dark skin tone", "feuerwehrfrau dunkle hautfarbe")
    assert captions["1f469-1f3ff-200d-1f692.webp"] == expected
    women = ClipSource(data, where="person == 'woman' and tone == 'dark'")
    assert set(women.column("role")) == {"firefighter", "cook", "pilot"}
    held_out = ClipSource(data, where="held_out != ''")
    assert {name.removesuffix(".webp") for name in held_out.column("name")} == set(preparation.held_out)
    assert {info.split for info in held_out.infos} == {"validation"}


def test_preparing_continues_and_names_what_cannot_be_used(drawn, tmp_path):
    files = tmp_path / "files"
    shutil.copytree(drawn, files)
    shutil.copy(next(files.iterdir()), files / "1f3f4-e0067_e0062.webp")
    broken = files / f"{STEMS[3]}.webp"
    content = bytearray(broken.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 60] = bytes(60)
    broken.write_bytes(content)
    folder = tmp_path / "clips"
    preparation = prepare(find_files(files, files), folder, seed=0, workers=0)
    assert preparation.unknown == ("1f3f4-e0067_e0062",)
    assert list(preparation.damaged) == [STEMS[3]]
    assert "damaged" in preparation.damaged[STEMS[3]]
    assert len(preparation.names) == len(STEMS) - 1
    (folder / f"{STEMS[0]}.webp").unlink()
    times = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.webp")}
    assert prepare(find_files(files, files), folder, seed=0, workers=1) == preparation
    assert {name: (folder / name).stat().st_mtime_ns for name in times} == times
    assert (folder / f"{STEMS[0]}.webp").is_file()


def test_a_frame_of_another_shape_is_put_into_a_square(tmp_path):
    Image.new("RGBA", (100, 200), (255, 0, 0, 255)).save(tmp_path / "2764.webp", lossless=True)
    prepare(find_files(tmp_path, tmp_path), tmp_path / "clips", seed=0, workers=0)
    frame = decode(tmp_path / "clips" / "2764.webp").frames[0]
    assert frame.shape == (SIDE, SIDE, 3)
    assert (frame[:, 40:88] == (255, 0, 0)).all()
    assert not frame[:, :30].any()


def test_no_usable_file_is_an_error(tmp_path):
    (tmp_path / "1f600.webp").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"none of the 1 files can be used \(first: 1f600"):
        prepare(find_files(tmp_path, tmp_path), tmp_path / "clips", seed=0, workers=0)


@pytest.mark.parametrize(("seconds", "intervals"), [(3.024, 24), (4.07, 32), (1.2, 8), (0.1, 4), (2.26, 20)])
def test_a_period_has_a_multiple_of_four_frames(seconds, intervals):
    assert count_intervals(seconds) == intervals


# --- packages ---------------------------------------------------------------------------------------------------------


def pack(drawn, folder, number=1, count=None):
    """Write a package of npm with some files; return it."""
    name = f"fluent-emoji-anim-{number}"
    content = folder / "package"
    (content / "assets").mkdir(parents=True)
    (content / "package.json").write_text(f'{{"name": "@lobehub/{name}"}}')
    first = next(drawn.iterdir())
    for index in range(PACKAGES[name] if count is None else count):
        os.link(first, content / "assets" / f"{index:05x}.webp")
    archive = folder / f"lobehub-{name}-1.0.0.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(content, "package")
    shutil.rmtree(content)
    return archive


@pytest.fixture
def npm(drawn, tmp_path, monkeypatch):
    """Put an npm on the path that writes packages instead of fetching them, and lists its arguments."""
    archives = tmp_path / "archives"
    for number in range(1, 5):
        pack(drawn, archives, number)
    tools = tmp_path / "bin"
    tools.mkdir()
    script = f"""#!{sys.executable}
import pathlib, shutil, sys
pathlib.Path({str(tmp_path / "calls")!r}).open("a").write(" ".join(sys.argv[1:]) + "\\n")
if pathlib.Path({str(tmp_path / "offline")!r}).exists():
    sys.exit("npm error code ENOTFOUND\\nnpm error network request failed")
for name in sys.argv[4:]:
    name = name.removeprefix("@lobehub/").replace("@", "-")
    shutil.copy(f"{archives}/lobehub-{{name}}.tgz", sys.argv[3])
"""
    (tools / "npm").write_text(script)
    (tools / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", str(tools))
    return tmp_path


def test_packages_that_are_missing_are_fetched_by_npm(npm):
    folder = npm / "source"
    fetch(folder)
    assert len(find_files(folder, folder)) == max(PACKAGES.values())  # of the same names in each
    assert sorted(path.name for path in folder.iterdir()) == sorted(PACKAGES)
    fetch(folder)
    shutil.rmtree(folder / "fluent-emoji-anim-2")
    fetch(folder)
    calls = (npm / "calls").read_text().splitlines()
    assert len(calls) == 2
    assert calls[0].split()[3:] == [f"@lobehub/{name}@1.0.0" for name in PACKAGES]
    assert calls[1].split()[3:] == ["@lobehub/fluent-emoji-anim-2@1.0.0"]


def test_without_npm_or_network_the_two_commands_are_named(npm, monkeypatch):
    commands = r"npm pack @lobehub/fluent-emoji-anim-1@1\.0\.0 .*experiments/emoji\.py --source \."
    (npm / "offline").touch()
    with pytest.raises(UserError, match=rf"(?s)ENOTFOUND\)\. Run these two commands.*{commands}"):
        fetch(npm / "source")
    assert not list((npm / "source").iterdir())
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=f"(?s)npm, which fetches the emoji, is not installed.*{commands}"):
        fetch(npm / "source")


def test_archives_are_unpacked_once(drawn, tmp_path):
    pack(drawn, tmp_path / "packed")
    files = find_files(tmp_path / "packed", tmp_path / "unpacked")
    assert len(files) == PACKAGES["fluent-emoji-anim-1"]
    times = {path: path.stat().st_mtime_ns for path in files.values()}
    assert {p: p.stat().st_mtime_ns for p in find_files(tmp_path / "packed", tmp_path / "unpacked").values()} == times


def test_a_package_that_is_there_in_part_is_refused(drawn, tmp_path):
    archive = pack(drawn, tmp_path / "packed", count=12)
    with pytest.raises(UserError, match="has 12 of the 999 files of fluent-emoji-anim-1: it is half unpacked"):
        find_files(archive.parent, tmp_path / "unpacked")
    cut = tmp_path / "cut" / archive.name
    cut.parent.mkdir()
    cut.write_bytes(archive.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"cut.*\.tgz is damaged .* Fetch it again"):
        find_files(cut.parent, tmp_path / "other")
    assert not (tmp_path / "other" / "fluent-emoji-anim-1").exists()


def test_a_folder_without_emoji_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no files of emoji"):
        find_files(tmp_path, tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        find_files(tmp_path / "nowhere", tmp_path)
    assert source_module.LICENCE
