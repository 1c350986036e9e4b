"""Splash attention in blocks of other sizes, in Pallas' interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_video.nn.attention import AttentionInputs, CausalFrames, Full, SplashBlocks
from dit_video.nn.attention.dense import DenseAttention
from dit_video.nn.attention.splash import SplashAttention
from support.devices import HANG, PROGRAMS

LENGTH, HEADS, WIDTH = 500, 2, 8
SEGMENTS = jnp.asarray(np.repeat([1, 2, 3, 0], [260, 100, 100, 40])[None], jnp.int32)
INDICES = jnp.tile((jnp.arange(LENGTH, dtype=jnp.int32) % 100 // 25)[None, :, None], (1, 1, 3))
UNEVEN = {
    "block_q": 256,
    "block_kv": 512,
    "block_kv_compute": 128,
    "block_q_dkv": 128,
    "block_kv_dkv": 256,
    "block_kv_dkv_compute": 128,
}


def test_sizes_that_are_not_set_follow_those_that_are():
    default = SplashBlocks().resolve(10_000, 10_000)
    assert {*default[:8]} == {1024}
    blocks = SplashBlocks(block_q=256, block_kv=512, block_kv_compute=128, block_kv_dkv=384).resolve(10_000, 10_000)
    assert (blocks.block_q, blocks.block_q_dkv, blocks.block_q_dq) == (256, 256, 256)
    assert (blocks.block_kv, blocks.block_kv_compute, blocks.block_kv_dq) == (512, 128, 512)
    assert (blocks.block_kv_dkv, blocks.block_kv_dkv_compute) == (384, 384)
    assert blocks.row_multiples == (256, 1536)


def test_blocks_are_no_longer_than_a_row():
    blocks = SplashBlocks(block_q=1024, block_kv=1024, block_kv_compute=512).resolve(200, 300)
    assert (blocks.block_q, blocks.block_kv, blocks.block_kv_compute) == (256, 384, 128)


@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, True], ids=["two kernels", "fused"])
@pytest.mark.parametrize("pattern", [Full(), CausalFrames()], ids=str)
def test_any_blocks_equal_the_dense_mask_in_values_and_gradients(pattern, fused):
    draw = np.random.default_rng(0)
    arrays = [jnp.asarray(draw.normal(size=(1, LENGTH, HEADS, WIDTH)), jnp.float32) for _ in range(4)]
    inputs = AttentionInputs.self_attention(SEGMENTS, INDICES)

    def compute(attention):
        def loss(q, k, v):
            out = attention(q, k, v, inputs)
            return (out * arrays[3]).sum(), out

        gradients, out = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*arrays[:3])
        return [out, *gradients]

    blocks = SplashBlocks(**UNEVEN, block_q_dq=128, block_kv_dq=512, use_fused_bwd_kernel=fused)
    result = compute(SplashAttention(pattern=pattern, blocks=blocks, interpret=True))
    for name, one, other in zip("vqkv", result, compute(DenseAttention(pattern=pattern)), strict=True):
        np.testing.assert_allclose(one, other, atol=5e-6, err_msg=name)


# The kernel for TPU is compiled ahead of time, by the libtpu of the [tpu] extra


ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.usefixtures("optimized_compilation")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "width"),
    [
        ("v5e:2x2", 64),
        *(pytest.param(each, 128, marks=pytest.mark.nightly) for each in ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")),
    ],
)
def test_splash_compiles_for_a_topology(topology, width):
    """This takes a process of its own: one that has libtpu would look for TPUs from then on."""
    pytest.importorskip("libtpu", reason="libtpu is not installed: pip install -e '.[tpu]'")
    command = [sys.executable, "-P", str(PROGRAMS / "splash_for_tpu.py"), topology, str(width)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=HANG, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    for line in lines:
        pattern, kernels, sorts, temporary = line.rsplit(" ", 3)
        assert int(kernels) >= 3, pattern  # forward, gradients of queries, gradients of keys and values
        # A token with a segment sees itself, so nothing needs a sort.
        assert int(sorts) == 0 or "CausalFrames" in pattern, pattern
        # One row a chip. Its scores alone would take 2 heads × 8192² × 4 bytes = 537 MB.
        assert int(temporary) < 60e6, pattern
