"""Results of attention that `remat` keeps for the backward pass."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dit_video.distributed import Parallelism, RingAttention, ShardedAttention, make_mesh
from dit_video.nn import Linear, apply_stack, make_stack
from dit_video.nn.attention import AttentionInputs, CausalFrames, ContiguousSegments, SplashBlocks
from dit_video.nn.attention.chunked import ChunkedAttention
from dit_video.nn.attention.cudnn import CudnnAttention
from dit_video.nn.attention.splash import SplashAttention
from support.cudnn_emulation import EMULATED_KERNELS
from support.jaxprs import count_primitive

HEADS, WIDTH, LENGTH = 2, 8, 24
SEGMENTS = jnp.asarray([[1] * 10 + [2] * 8 + [0] * 6, [1] * 3 + [2] * 21], jnp.int32)
PLACES = jnp.tile(jnp.arange(LENGTH, dtype=jnp.int32)[None, :, None] // 4, (2, 1, 3))
CUDNN = CudnnAttention(kernels=EMULATED_KERNELS)
BACKENDS = {
    "of segments": ChunkedAttention(chunk=8, platform="cpu"),
    "of blocks": ChunkedAttention(chunk=8, platform="gpu"),
    "of a pattern": ChunkedAttention(chunk=8, pattern=CausalFrames()),
    "splash": SplashAttention(blocks=SplashBlocks(block_q=128, block_kv=128), interpret=True),
    "cudnn": CUDNN,
    "over devices": ShardedAttention(make_mesh(Parallelism(), jax.devices()[:1]), ChunkedAttention(chunk=8), "ulysses"),
    "ring": ShardedAttention(make_mesh(Parallelism(), jax.devices()[:1]), RingAttention("context", 1, chunk=8), "ring"),
}


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.qkv = Linear(HEADS * WIDTH, 3 * HEADS * WIDTH, rngs=rngs)

    def __call__(self, x, attention, inputs):
        q, k, v = jnp.moveaxis(self.qkv(jnp.sin(x)).reshape(*x.shape[:2], 3, HEADS, WIDTH), 2, 0)
        return x + attention(q, k, v, inputs).reshape(x.shape)


STACK = make_stack(Layer, 2, rngs=nnx.Rngs(0))
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, LENGTH, HEADS * WIDTH)), jnp.float32)


def gradients(attention, remat, params):
    graph, _ = nnx.split(STACK)

    def value(params):
        inputs = AttentionInputs.self_attention(SEGMENTS, PLACES, segment_count=2)
        return jnp.cos(apply_stack(nnx.merge(graph, params), X, attention, inputs, remat=remat)).sum()

    return jax.grad(value)(params)


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKENDS)
def test_attention_is_not_recomputed_under_its_remat_policy(name):
    params = nnx.split(STACK)[1]

    def products(remat):
        program = jax.make_jaxpr(functools.partial(gradients, BACKENDS[name], remat))(params)
        return count_primitive("dot_general", program.jaxpr)

    once = products("none")
    inside = products("dots_no_batch") - once  # of attention's forward pass
    assert inside >= 2
    assert products("full") == once + inside + 1
    assert products("attention") == once + 1  # the one with weights
    assert products("dots_attention") == once


@pytest.mark.nightly
@pytest.mark.parametrize("name", BACKENDS)
def test_gradients_do_not_depend_on_the_remat_policy(name):
    params = nnx.split(STACK)[1]
    expected, result = (
        jax.jit(functools.partial(gradients, BACKENDS[name], remat))(params) for remat in ("none", "dots_attention")
    )
    for one, other in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "backend",
    [
        ChunkedAttention(chunk=8, platform="cpu"),
        ChunkedAttention(chunk=8, platform="gpu"),
        SplashAttention(),
        CUDNN,
    ],
)
def test_cross_attention_keeps_no_results_for_the_backward_pass(backend):
    def names(keys):
        def value(q, k):
            inputs = AttentionInputs(
                q_segments=SEGMENTS,
                context_segments=None if keys is X else SEGMENTS[:, : keys.shape[1]],
                contiguous=ContiguousSegments(2),
            )
            return backend(q, k, k, inputs).sum()

        heads = [x.reshape(*x.shape[:2], HEADS, WIDTH) for x in (X, keys)]
        return count_primitive("name", jax.make_jaxpr(jax.grad(value))(*heads).jaxpr)

    assert names(X) == 2  # the outputs, and the logarithms of the sums
    assert names(X[:, :5]) == 0
