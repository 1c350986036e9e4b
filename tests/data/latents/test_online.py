"""Clips that are encoded as they come: few programs, and the latents that each clip has alone."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from dit_video.autoencoders import PatchVaeConfig
from dit_video.core import pixels
from dit_video.core.errors import UserError
from dit_video.data.latents.online import CanvasEncoder, OnlineEncoder
from dit_video.nn import get_graph_def
from dit_video.tokens import Grid
from support.devices import HANG
from support.rough import rough_params

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROOT = Path(__file__).resolve().parents[3]
CONFIG = PatchVaeConfig(stride=Grid(2, 4, 4), channels=3, width=8, blocks=1)
SIZES = [Grid(t, 4 * h, 4 * w) for t in (1, 3, 5) for h in (2, 3) for w in (2, 4)]


def some_clips():
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (*SIZES[index], 3), np.uint8) for index in generator.integers(0, 12, 9)]


@pytest.fixture(scope="module")
def alone():
    """The latents that each clip has alone."""
    params = rough_params(CONFIG.make)
    encode = jax.jit(lambda frames: nnx.merge(get_graph_def(CONFIG.make), params).encode(frames))
    return [np.asarray(encode(pixels.to_float(clip[None])))[0] for clip in some_clips()]


@pytest.mark.parametrize("options", [{}, {"calls": 3}, {"canvas_pixels": 1}])
def test_latents_are_those_of_each_clip_alone(alone, options):
    encoder, clips = OnlineEncoder(CONFIG, rough_params(CONFIG.make), SIZES, **options), some_clips()
    assert len(encoder.canvases) <= 8
    for found, expected in zip(encoder(clips), alone, strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-5)
    for found, expected in zip(encoder(clips[::-1])[::-1], alone, strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-5)
    assert encoder([]) == []


def test_as_many_are_computed_together_as_come_or_as_the_device_holds():
    params, size = rough_params(CONFIG.make), Grid(3, 8, 8)
    assert OnlineEncoder(CONFIG, params, [size] * 12).batch_sizes == {size: 12}
    assert OnlineEncoder(CONFIG, params, [size] * 12, calls=2.5).batch_sizes == {size: 5}
    # 12 in batches of at most 5 are three of 4.
    assert OnlineEncoder(CONFIG, params, [size] * 12, canvas_pixels=5 * size.volume).batch_sizes == {size: 4}
    assert OnlineEncoder(CONFIG, params, [size] * 12, canvas_pixels=1).batch_sizes == {size: 1}
    merged = OnlineEncoder(CONFIG, params, SIZES * 2, calls=2)
    assert sum(merged.batch_sizes.values()) == 12
    assert CanvasEncoder(CONFIG, params).compute_batch_size(size, 1) == jax.local_device_count()


WORKER = """
import sys
import numpy as np
sys.path.insert(0, sys.argv[1])
import test_online as t
encoder = t.LiveEncoder(t.CONFIG, t.rough_params(t.CONFIG.make), t.SIZES)
assert set(encoder.together.values()) == {3}, encoder.together
encode, seen = encoder._encode, set()
encoder._encode = lambda *arrays: (latents := encode(*arrays), seen.add(len(latents.sharding.device_set)))[0]
np.savez(sys.argv[2], *encoder(t.some_clips()))
assert seen == {3}
"""


def test_batches_are_split_over_the_devices_of_a_process(alone, tmp_path):
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=3"}
    done = subprocess.run(
        [sys.executable, "-c", WORKER, str(Path(__file__).parent), str(tmp_path / "latents.npz")],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
            "JAX_PLATFORMS": "cpu",
            **flags,
        },
        capture_output=True,
        text=True,
        timeout=HANG,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "latents.npz") as found:
        for number, expected in enumerate(alone):
            np.testing.assert_allclose(found[f"arr_{number}"], expected, atol=2e-5)


def test_a_clip_that_was_not_announced():
    encoder = OnlineEncoder(CONFIG, rough_params(CONFIG.make), [Grid(3, 8, 8)])
    with pytest.raises(UserError, match="a clip of 5x8x8 is larger than all in sizes"):
        encoder([np.zeros((5, 8, 8, 3), np.uint8)])
