"""evaluate.py on a folder of videos and by a protocol, and compare.py, as a user starts them."""

import json

import numpy as np
import pytest

from support.colour_features import draw_clips


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for number, clip in enumerate(draw_clips(6, seed=0)):
        frames = clip.frames.repeat(8, axis=1).repeat(8, axis=2)
        type(clip)(np.ascontiguousarray(frames), fps=8).save(folder / f"{number}.mp4")
    return folder


def test_folders_are_measured_and_compared(folder, tmp_path, script):
    names = ("--metrics", "sharpness", "colourfulness", "fvd")
    for out in ("a", "b"):
        done = script("experiments/evaluate.py", folder, "--out", tmp_path / out, "--data", folder, *names)
        assert done.code == 0, done.err
    assert "i3d.safetensors" in done.out
    assert "sharpness: " in done.out
    record = json.loads((tmp_path / "a" / "samples" / "metrics.json").read_text())
    assert [each["name"] for each in record["results"]] == ["sharpness", "colourfulness"]
    page = (tmp_path / "a" / "samples" / "report.html").read_text()
    assert "Best and worst" not in page  # neither value is better when it is higher
    assert "i3d.safetensors" in page
    results = [tmp_path / name / "samples" for name in "ab"]
    compared = script("experiments/compare.py", *results, "--out", tmp_path / "c")
    assert compared.code == 0, compared.err
    assert "sharpness" in compared.out
    assert json.loads((tmp_path / "c" / "comparison.json").read_text())["names"] == ["a", "b"]


def test_clips_that_are_too_short_are_named(folder, tmp_path, script):
    arguments = ("--protocol", "reconstruction", "--metrics", "psnr", "reconstruction_flicker")
    refused = script("experiments/evaluate.py", folder, "--out", tmp_path, "--data", folder, *arguments)
    assert refused.code == 2
    assert "17 are measured" in refused.err.replace("\n", " ")


def test_mistakes_are_named(folder, tmp_path, script):
    nowhere = script("experiments/evaluate.py", folder)
    assert nowhere.code == 2
    assert "use --out FOLDER" in nowhere.err.replace("\n", " ")
    unknown = script("experiments/evaluate.py", folder, "--out", tmp_path, "--protocol", "ucf")
    assert unknown.code == 2
    assert "msrvtt" in unknown.err


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (("--protocol", "reconstruction"), "Name these with --data"),
        (("--count", 7), "has 6 clips. Use --count 6"),
        (("--steps", 4), "a folder of videos is not sampled"),
        (("--seed", 4), "a folder of videos is not sampled"),
    ],
)
def test_options_without_effect_are_refused(folder, tmp_path, script, arguments, rule):
    ended = script("experiments/evaluate.py", folder, "--out", tmp_path, *arguments)
    assert ended.code == 2
    assert rule in ended.err.replace("\n", " ")


def test_options_of_a_protocol_are_refused_without_one(tmp_path, script):
    arguments = ("experiments/pretrained/shapes", "--out", tmp_path, "--count", 4)
    assert "belong to a protocol" in script("experiments/evaluate.py", *arguments).err


def test_values_that_no_clip_determines_and_clips_left_out_are_printed(tmp_path, script):
    for number, clip in enumerate(draw_clips(3, seed=0)):
        type(clip)(np.ascontiguousarray(clip.frames[:1].repeat(16, axis=1)), fps=8).save(tmp_path / f"{number}.png")
    arguments = (tmp_path, "--out", tmp_path / "out", "--metrics", "temporal_flickering", "sharpness")
    done = script("experiments/evaluate.py", *arguments)
    assert done.code == 0, done.err
    assert "temporal flickering: no value: " in done.out
    assert "left out" not in done.out
