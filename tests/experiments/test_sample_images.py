"""`experiments/sample.py` with images, clips and masks."""

import json
from dataclasses import replace

import numpy as np
import pytest

import dit_video
from dit_video.evaluation.clip_set import open_clip_set
from dit_video.sampling.pipeline import Pipeline
from dit_video.tokens import Grid
from dit_video.video.clip import Clip
from dit_video.video.decode import decode
from support.tiny_vace import write_vace
from support.tiny_wan import write_animating_wan, write_wan

SAMPLE = "experiments/sample.py"


@pytest.fixture
def pictures(tmp_path):
    """Write two pictures of another size than the samples."""
    paths = [tmp_path / f"{seed}.png" for seed in range(2)]
    for seed, path in enumerate(paths):
        frames = np.random.default_rng(seed).integers(0, 256, (1, 20, 24, 3), dtype=np.uint8)
        Clip(frames, 1.0).save(path)
    return paths


@pytest.mark.slow
def test_a_clip_begins_with_an_image(script, tmp_path, pictures):
    write_animating_wan(tmp_path / "wan")
    clips = []
    for picture in pictures:
        out = picture.with_suffix(".gif")
        options = ("--size", "5x16x16", "--steps", 2, "--guidance", 1, "--out", out)
        done = script(SAMPLE, tmp_path / "wan", "--prompt", "a dog", "--image", picture, *options)
        assert done.code == 0, done.err
        clips.append(decode(out).frames)
    assert clips[0].shape == (5, 16, 16, 3)
    assert (clips[0] != clips[1]).any()


def test_images_that_a_model_cannot_use_are_refused(script, tmp_path, pictures):
    write_wan(tmp_path / "wan")
    options = ("--image", pictures[0], "--size", "5x16x16", "--steps", 2, "--out", tmp_path / "x.gif")
    done = script(SAMPLE, tmp_path / "wan", "--prompt", "a dog", "--method", "trained", *options)
    assert done.code == 2
    assert "method='trained' is invalid" in done.err
    (tmp_path / "prompts.json").write_text("[]")
    done = script(
        SAMPLE, tmp_path / "wan", "--prompts", tmp_path / "prompts.json", "--image", pictures[0], "--out", tmp_path
    )
    assert done.code == 2
    assert "--image and other options of one clip need --prompt; put them in the list" in " ".join(done.err.split())
    for option, rule in (("--conditions", "FILE@FRAME@STRENGTH"), ("--strengths", "NAME=NUMBER")):
        done = script(SAMPLE, tmp_path / "wan", "--prompt", "a dog", option, "x", "--out", tmp_path / "x.gif")
        assert done.code == 2
        assert rule in done.err


@pytest.mark.slow
def test_each_prompt_of_a_list_has_its_image_and_clips_have_its_aspect_ratio(script, tmp_path):
    write_animating_wan(tmp_path / "wan")
    pipeline = dit_video.load(tmp_path / "wan", dtype="float32")
    config = replace(pipeline.config, size=Grid(5, 16, 32))  # smaller than any of a published model
    parameters = {"autoencoder": pipeline.codec.params, "denoiser": pipeline.denoiser_params}
    Pipeline(config, **parameters).save(tmp_path / "small")
    draw = np.random.default_rng(0)
    sizes = {"wide": (10, 20), "high": (40, 20), "wide as well": (20, 40)}
    for name, size in sizes.items():
        Clip(draw.integers(0, 256, (1, *size, 3), dtype=np.uint8), 1.0).save(tmp_path / f"{name}.png")
    entries = [{"prompt": "a dog", "image": f"{name}.png"} for name in sizes]
    (tmp_path / "prompts.json").write_text(json.dumps(entries))
    options = ("--steps", 2, "--guidance", 1, "--out", tmp_path / "samples")
    done = script(SAMPLE, tmp_path / "small", "--prompts", tmp_path / "prompts.json", *options)
    assert done.code == 0, done.err
    samples = open_clip_set(tmp_path / "samples")
    clips = [samples.read(number, None).frames for number in range(len(samples.names))]
    assert [clip.shape[:3] for clip in clips] == [(5, 16, 32), (5, 32, 16), (5, 16, 32)]
    assert (clips[0] != clips[2]).any()


@pytest.mark.slow
def test_a_model_with_control_takes_clips_masks_and_images_of_subjects(script, tmp_path, pictures):
    write_vace(tmp_path / "vace")
    files, draw = {}, np.random.default_rng(0)
    for name in ("control", "video", "generated"):
        frames = draw.integers(0, 2, (5, 16, 16, 1), dtype=np.uint8) * 255
        files[name] = tmp_path / f"{name}.gif"
        Clip(frames.repeat(3, -1), 16).save(files[name])
    common = (SAMPLE, tmp_path / "vace", "--prompt", "a dog", "--size", "5x16x16", "--steps", 2, "--guidance", 1)
    clips = []
    for number, options in enumerate(
        (
            ("--control", files["control"]),
            ("--control", files["control"], "--strengths", "control=0.2,0.5"),
            ("--video", files["video"], "--generated", files["generated"]),
            ("--reference-images", *pictures),
        )
    ):
        out = tmp_path / f"{number}.gif"
        done = script(*common, *options, "--out", out)
        assert done.code == 0, done.err
        clips.append(decode(out).frames)
        assert clips[-1].shape == (5, 16, 16, 3)
        assert all((clips[-1] != other).any() for other in clips[:-1])
    for options, message in (
        (("--strengths", "control=1,2,3"), "control has one strength or 2, not 3"),
        (("--control", pictures[0]), "control of 1 frames is invalid for a clip of 5"),
        (("--video", files["video"]), "video and generated need each other"),
    ):
        done = script(*common, *options, "--out", tmp_path / "x.gif")
        assert done.code == 2
        assert message in " ".join(done.err.split())
