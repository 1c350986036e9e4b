"""The option `--parallel` of the scripts that sample."""

import jax
import numpy as np
import pytest

from dit_video.sampling.pipeline import Request
from dit_video.scenes import shapes_evaluation
from dit_video.tokens import Grid
from dit_video.video import decode

PROMPT = "a red circle moving left"


@pytest.mark.slow
def test_sample_and_evaluate_take_a_mesh(script, tiny_run, tmp_path, monkeypatch):
    few = [Request(PROMPT, Grid(1, 16, 16), seed=1)]
    monkeypatch.setattr(shapes_evaluation, "make_shape_requests", lambda seed: few)
    clips = []
    for options in ((), ("--parallel", f"data={len(jax.devices())}")):
        out = tmp_path / f"{len(clips)}.png"
        size = ("--size", "1x16x16", "--steps", 1, "--out", out)
        assert script("experiments/sample.py", tiny_run, "--prompt", PROMPT, *size, *options).code == 0
        clips.append(decode(out).frames.astype(int))
    assert np.abs(clips[0] - clips[1]).max() <= 1
    assert script("experiments/evaluate.py", tiny_run, "--out", tmp_path / "out", "--parallel", "data=-1").code == 0
