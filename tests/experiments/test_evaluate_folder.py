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
