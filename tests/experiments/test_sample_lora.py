"""`experiments/sample.py` with adapters."""

import numpy as np
import pytest

from dit_video.video.decode import decode
from support.tiny_lora import make_pipeline, write_lora

SAMPLE = "experiments/sample.py"


@pytest.mark.slow
def test_adapters_are_attached_with_their_scales(script, tmp_path):
    pipeline = make_pipeline()
    pipeline.save(tmp_path / "model")
    lora = write_lora(tmp_path / "style.safetensors", pipeline)
    clips = {}
    for name, options in {"none": (), "full": ("--lora", lora), "zero": ("--lora", f"{lora}@0")}.items():
        out = tmp_path / f"{name}.gif"
        common = ("--size", "5x16x16", "--steps", 2, "--guidance", 1, "--out", out)
        done = script(SAMPLE, tmp_path / "model", "--prompt", "a dog", *common, *options)
        assert done.code == 0, done.err
        clips[name] = decode(out).frames
    assert (clips["full"] != clips["none"]).any()
    np.testing.assert_array_equal(clips["zero"], clips["none"])


def test_an_adapter_that_does_not_exist_is_named_before_anything_is_loaded(script, tmp_path):
    done = script(
        SAMPLE, tmp_path, "--prompt", "a dog", "--lora", "nowhere.safetensors@0.5", "--out", tmp_path / "x.gif"
    )
    assert done.code == 2
    assert "no such file: nowhere.safetensors of --lora" in " ".join(done.err.split())
