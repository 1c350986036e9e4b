"""Online encoding of clips: few programs, and latents equal to those of each clip alone."""

import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx

from dit_video.core import pixels
from dit_video.core.errors import UserError
from dit_video.data.latents.online import CanvasEncoder, OnlineEncoder
from dit_video.nn import get_graph_def
from dit_video.tokens import Grid
from support.devices import HANG, PROGRAMS, make_environment
from support.online_clips import CONFIG, SIZES, make_clips
from support.random_params import make_random_params


@pytest.fixture(scope="module")
def separate_latents():
    """Return the latents of each clip, encoded by itself."""
    params = make_random_params(CONFIG.make)
    encode = jax.jit(lambda frames: nnx.merge(get_graph_def(CONFIG.make), params).encode(frames))
    return [np.asarray(encode(pixels.to_float(clip[None])))[0] for clip in make_clips()]


@pytest.mark.parametrize("options", [{}, {"calls": 3}, {"canvas_pixels": 1}])
def test_latents_are_those_of_each_clip_alone(separate_latents, options):
    encoder, clips = OnlineEncoder(CONFIG, make_random_params(CONFIG.make), SIZES, **options), make_clips()
    assert len(encoder.canvases) <= 8
    for latents, expected in zip(encoder(clips), separate_latents, strict=True):
        np.testing.assert_allclose(latents, expected, atol=2e-5)
    for latents, expected in zip(encoder(clips[::-1])[::-1], separate_latents, strict=True):
        np.testing.assert_allclose(latents, expected, atol=2e-5)
    assert encoder([]) == []


def test_a_batch_holds_as_many_clips_as_arrive_together_or_as_fit_the_device():
    params, size = make_random_params(CONFIG.make), Grid(3, 8, 8)
    assert OnlineEncoder(CONFIG, params, [size] * 12).batch_sizes == {size: 12}
    assert OnlineEncoder(CONFIG, params, [size] * 12, calls=2.5).batch_sizes == {size: 5}
    # 12 in batches of at most 5 are three of 4.
    assert OnlineEncoder(CONFIG, params, [size] * 12, canvas_pixels=5 * size.volume).batch_sizes == {size: 4}
    assert OnlineEncoder(CONFIG, params, [size] * 12, canvas_pixels=1).batch_sizes == {size: 1}
    merged = OnlineEncoder(CONFIG, params, SIZES * 2, calls=2)
    assert sum(merged.batch_sizes.values()) == 12
    assert CanvasEncoder(CONFIG, params).compute_batch_size(size, 1) == jax.local_device_count()


@pytest.mark.slow
def test_batches_are_split_over_the_devices_of_a_process(separate_latents, tmp_path):
    process = subprocess.run(
        [sys.executable, str(PROGRAMS / "online_encoding.py"), str(tmp_path / "latents.npz")],
        env=make_environment(3),
        capture_output=True,
        text=True,
        timeout=HANG,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    with np.load(tmp_path / "latents.npz") as latents:
        for number, expected in enumerate(separate_latents):
            np.testing.assert_allclose(latents[f"arr_{number}"], expected, atol=2e-5)


def test_a_clip_larger_than_all_announced_sizes_is_refused():
    encoder = OnlineEncoder(CONFIG, make_random_params(CONFIG.make), [Grid(3, 8, 8)])
    with pytest.raises(UserError, match="a clip of 5x8x8 is larger than all in sizes"):
        encoder([np.zeros((5, 8, 8, 3), np.uint8)])
