"""`experiments/sample.py` with the first frame given."""

import numpy as np
import pytest

from dit_video.video.clip import Clip
from dit_video.video.decode import decode
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
    done = script(SAMPLE, tmp_path / "wan", "--prompt", "a dog", *options)
    assert done.code == 2
    assert "image" in done.err
    (tmp_path / "prompts.json").write_text("[]")
    done = script(
        SAMPLE, tmp_path / "wan", "--prompts", tmp_path / "prompts.json", "--image", pictures[0], "--out", tmp_path
    )
    assert done.code == 2
    assert "--image and --last-image need --prompt; drop them" in " ".join(done.err.split())
