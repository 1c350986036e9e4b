"""Splash attention in blocks of other sizes, in Pallas' interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_video.nn.attention import AttentionInputs, CausalFrames, Full, SplashBlocks
from dit_video.nn.attention.dense import DenseAttention
from dit_video.nn.attention.splash import SplashAttention

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
