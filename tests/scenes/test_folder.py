"""Scenes as files, read as a user's clips are."""

import json

import numpy as np
import pytest

from dit_video.core.errors import UserError
from dit_video.data.ingest.formats import list_clips
from dit_video.scenes import draw_scene, render, write_folder
from dit_video.tokens import Grid
from dit_video.video import decode

OPTIONS = {"count": 4, "seed": 2, "levels": (1, 3), "sizes": (Grid(5, 48, 48), Grid(1, 48, 64))}


def test_scenes_are_read_by_the_path_of_a_users_clips(tmp_path):
    done = []
    folder = write_folder(tmp_path / "scenes", **OPTIONS, progress=lambda *numbers: done.append(numbers))
    assert done == [(1, 4), (2, 4), (3, 4), (4, 4)]
    listing = list_clips(folder)
    documents = [json.loads(line) for line in (folder / "scenes.jsonl").read_text().splitlines()]
    assert len(listing.clips) == len(documents) == 4
    for index, (clip, document) in enumerate(zip(listing.clips, documents, strict=True)):
        scene = draw_scene(index, seed=2, level=(1, 3)[index % 2], sizes=OPTIONS["sizes"])
        assert (clip.name, clip.captions) == (document["file_name"], (scene.caption,))
        assert document["level"] == scene.level
        decoded, rendered = decode(folder / clip.name), render(scene).clip
        assert decoded.frames.shape == rendered.frames.shape
        assert np.abs(decoded.frames.astype(float) - rendered.frames).mean() < 6


def test_an_interrupted_folder_is_completed_and_another_is_refused(tmp_path):
    folder = write_folder(tmp_path / "scenes", **OPTIONS)
    table = (folder / "metadata.csv").read_bytes()
    (folder / "metadata.csv").unlink()
    (missing, *_) = (folder / "clips").iterdir()
    content = missing.read_bytes()
    missing.unlink()
    write_folder(folder, **OPTIONS)
    assert (missing.read_bytes(), (folder / "metadata.csv").read_bytes()) == (content, table)
    with pytest.raises(UserError, match=r"holds clips of another seed .* Use another folder"):
        write_folder(folder, **(OPTIONS | {"seed": 3}))
    with pytest.raises(UserError, match="count=0 of 2 levels is invalid"):
        write_folder(tmp_path / "none", **(OPTIONS | {"count": 0}))


def test_depth_lies_beside_the_clips_under_their_names_and_loops_are_another_recipe(tmp_path):
    done = []
    options = {"depth": tmp_path / "depth", "progress": lambda *numbers: done.append(numbers)}
    folder = write_folder(tmp_path / "scenes", **OPTIONS, **options)
    assert done == [(1, 4), (2, 4), (3, 4), (4, 4)] * 2
    for index, document in enumerate(json.loads(line) for line in (folder / "scenes.jsonl").read_text().splitlines()):
        rendered = render(draw_scene(index, seed=2, level=(1, 3)[index % 2], sizes=OPTIONS["sizes"]))
        shades = decode(tmp_path / "depth" / document["file_name"]).frames
        assert np.abs(shades.astype(float) - rendered.depth_clip.frames).mean() < 3
        assert np.median(shades[rendered.depth == 1.0]) == pytest.approx(128, abs=3)
    loops = {**OPTIONS, "sizes": (Grid(5, 48, 48),), "kind": "loops"}
    assert "in a loop" in (write_folder(tmp_path / "loops", **loops) / "metadata.csv").read_text()
    with pytest.raises(UserError, match="holds clips of another seed"):
        write_folder(folder, **loops)
