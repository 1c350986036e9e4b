"""The commands that annotate data sets, and that train a CLIP of scenes to show it."""

import importlib
import json
from pathlib import Path

import pytest

from dit_video.curation.clip_scores import ClipScores
from dit_video.scenes import draw_scene, render
from dit_video.tokens import Grid
from support.annotated_clips import FIELDS, make_clip, open_clips

ROOT = Path(__file__).resolve().parents[2]
TOOL = "tools/annotate.py"


@pytest.fixture
def data(tmp_path):
    """Return a data set that the tool opens."""
    contents = {f"{number}.mp4": make_clip(number) for number in range(4)} | {"4.mp4": b"damaged"}
    captions = {"0.mp4": ("a cat",)}
    open_clips(tmp_path / "data", contents, captions)
    return tmp_path / "data"


def test_columns_are_added_and_listed(data, script):
    done = script(TOOL, data, "motion_vectors")
    assert done.code == 0, done.err
    assert "motion_vectors of 5 clips" in done.out
    assert "without values: 4.mp4" in done.out
    again = script(TOOL, data, "motion_vectors")
    assert "motion_vectors of 0 clips" in again.out
    listed = script(TOOL, data, "--list")
    assert listed.code == 0, listed.err
    columns = {line.split()[0] for line in listed.out.splitlines()[1:]}
    assert {*FIELDS, "camera", "camera_pan", "motion_vectors_error"} <= columns


def test_columns_of_all_clips_are_left_to_the_process_that_ends_last(data, script):
    first = script(TOOL, data, "motion_vectors", "duplicates", "--shard", 1, "--shards", 2)
    assert first.code == 0, first.err
    assert "duplicates is left to the process that ends last" in first.out
    last = script(TOOL, data, "motion_vectors", "duplicates", "--shard", 0, "--shards", 2)
    assert last.code == 2
    assert "no column embedding" in last.err  # only now is it computed, and there is none


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no annotator is named"),
        (("motion",), "'motion' is invalid.*motion_vectors"),
        (("motion_vectors", "--shard", "2"), "shard=2"),
        (("duplicates",), "no column embedding.* clip before"),
        (("captions",), "model=''"),
        (("clip", "--clip.folder", "absent"), "absent"),
    ],
)
def test_mistakes_end_with_a_fix(data, script, arguments, message):
    done = script(TOOL, data, *arguments)
    assert done.code == 2
    assert done.err.splitlines()[-1].startswith("error: ")
    import re

    assert re.search(message, done.err)


def test_captions_of_an_unknown_price_need_a_yes(data, script, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "x")
    server = ("--captions.server.url", "https://api.example.invalid/v1", "--captions.server.model", "m")
    done = script(TOOL, data, "captions", *server)
    assert done.code == 2
    assert "an unknown price" in done.err
    assert "--yes" in done.err
    prices = ("--captions.input-price", "1000", "--captions.output-price", "1000")
    priced = script(TOOL, data, "captions", *server, *prices)
    assert "above --max-price 1" in priced.err


def train(script, folder, *options):
    done = script("tools/train_scene_clip.py", folder, *options)
    assert done.code == 0, done.err
    return done.out.splitlines()[-1]


def compute_matches(folder, count):
    """Return the match of clips of scenes with their caption, and with that of the next scene."""
    from dit_video.curation.annotator import ClipFile
    from dit_video.data.clips import ClipInfo
    from dit_video.video import encode

    scenes = [draw_scene(index, seed=777, level=1, sizes=(Grid(5, 48, 48),)) for index in range(count)]
    annotator, pairs = ClipScores(folder=str(folder), frames=2), []
    for scene, other in zip(scenes, scenes[1:] + scenes[:1], strict=True):
        content = encode(render(scene).clip, "mp4")
        facts = {"height": 48, "width": 48, "frames": 5, "fps": 8.0, "seconds": 0.5}
        infos = [ClipInfo(name="a", captions=(each.caption,), **facts) for each in (scene, other)]
        pairs.append([annotator.annotate(ClipFile(info, content))["text_match"] for info in infos])
    return pairs


@pytest.mark.parametrize(
    ("steps", "loss"),
    [
        pytest.param(100, (), id="softmax", marks=pytest.mark.slow),
        pytest.param(160, ("--sigmoid",), id="sigmoid", marks=pytest.mark.nightly),
    ],
)
def test_a_clip_trained_for_half_a_minute_tells_right_captions_from_wrong_ones(
    script, load_file, tmp_path, steps, loss
):
    line = train(script, tmp_path / "clip", "--clips", 600, "--steps", steps, "--batch", 64, *loss)
    right = float(line.rpartition(" ")[2].rstrip("%"))
    assert right > 75
    pairs = compute_matches(tmp_path / "clip", 24)
    assert sum(own > other for own, other in pairs) >= 18
    assert json.loads((tmp_path / "clip" / "config.json").read_text())["architectures"] == ["CLIPModel"]
    if not loss:
        load_file(ROOT / "tools" / "benchmark.py")  # puts its folder on the path
        figures = importlib.import_module("benchmarks.duplicates").measure(tmp_path / "clip", scenes=24)["default"]
        assert figures["recall"] >= 0.95
        assert figures["precision"] >= 0.9
        assert figures["second takes kept"] >= 0.75


def test_a_batch_needs_as_many_clips(script, tmp_path):
    done = script("tools/train_scene_clip.py", tmp_path, "--clips", 10)
    assert done.code == 2
    assert "--clips 10 is invalid" in done.err
