"""Compare attention whose tokens are split over eight devices with that on one device."""

import jax
import jax.numpy as jnp
import numpy as np

from dit_video.distributed import AXES, Parallelism, RingAttention, ShardedAttention, make_mesh
from dit_video.nn.attention import AttentionInputs, Bias, CausalFrames, Full, RelativeBias, SparseCausal
from dit_video.nn.attention.chunked import ChunkedAttention
from dit_video.nn.attention.dense import DenseAttention

LENGTH, HEADS = 44, 4
"""A number of tokens that 8 ranks do not divide, so that they are padded."""
RELATIVE = RelativeBias()
INDICES = np.stack([np.arange(LENGTH) // 4, np.arange(LENGTH) % 4, np.zeros(LENGTH)], axis=-1).astype(np.int32)
INDICES = np.tile(INDICES, (2, 1, 1))


def check_values_and_gradients(q, k, v, weight, table) -> None:
    """Compare values and gradients, with three segments to a row."""
    segments = np.asarray([[1] * 30 + [2] * 9 + [0] * 5, [1] * 3 + [2] * 20 + [3] * 21], np.int32)

    def compute(attention, biased):
        def value(q, k, v, table):
            inputs = AttentionInputs.self_attention(jnp.asarray(segments), jnp.asarray(INDICES))
            if biased:
                positions = jnp.asarray(INDICES, jnp.float32)
                bias = Bias(config=RELATIVE, table=table, q_positions=positions, kv_positions=positions)
                inputs = inputs._replace(bias=bias)
            out = attention(q, k, v, inputs)
            return (out * weight).sum(), out

        return jax.jit(jax.grad(value, argnums=(0, 1, 2, 3), has_aux=True))(q, k, v, table)

    for pattern, biased in ((Full(), True), (CausalFrames(), False), (SparseCausal(), False)):
        expected = compute(DenseAttention(pattern=pattern), biased)
        for sizes, method in (((1, 1, 1, 8), "ring"), ((2, 1, 1, 4), "ulysses"), ((1, 2, 2, 2), "ring")):
            mesh = make_mesh(Parallelism(**dict(zip(AXES, sizes, strict=True))))
            inner = (
                ChunkedAttention(pattern=pattern, chunk=8)
                if method == "ulysses"
                else RingAttention("context", sizes[3], pattern, 8)
            )
            actual = compute(ShardedAttention(mesh, inner, method), biased)
            for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
                np.testing.assert_allclose(one, other, atol=2e-5, err_msg=f"{pattern} {sizes} {method}")


def check_keys_that_are_not_queries(q, k, v) -> None:
    """Compare attention of a clip's last tokens to all of them, as with a cache of the keys before."""
    first = 20
    segments = jnp.asarray([[1] * 44, [2] * 40 + [0] * 4], jnp.int32)
    tokens = segments[:, first:], segments, jnp.asarray(INDICES[:, first:]), jnp.asarray(INDICES)
    pattern, inputs = CausalFrames(), AttentionInputs(*tokens)
    expected = DenseAttention(pattern=pattern)(q[:, first:], k, v, inputs)
    for method in ("ulysses", "ring"):
        mesh = make_mesh(Parallelism(data=2, context=4))
        inner = DenseAttention(pattern=pattern) if method == "ulysses" else RingAttention("context", 4, pattern, 8)
        actual = jax.jit(ShardedAttention(mesh, inner, method))(q[:, first:], k, v, inputs)
        np.testing.assert_allclose(actual, expected, atol=2e-5, err_msg=method)


def check_ranks_without_common_segments(q, k, v) -> None:
    """Check that a rank computes nothing with keys of which it has no segment, so that NaNs do not spread."""
    segments = np.asarray([[1] * 22 + [2] * 22] * 2, np.int32)
    v = v.at[:, :22].set(jnp.nan)
    mesh = make_mesh(Parallelism(data=4, context=2))
    inputs = AttentionInputs.self_attention(jnp.tile(jnp.asarray(segments), (2, 1)))
    heads = [jnp.concatenate([x, x]) for x in (q, k, v)]
    attention = ShardedAttention(mesh, RingAttention("context", 2, Full(), 32), "ring")
    out = jax.jit(attention)(*heads, inputs)
    assert np.isfinite(out[:, 22:]).all()
    assert np.isnan(out[:, :22]).all()


def main() -> None:
    """Run all checks."""
    draw = np.random.default_rng(0)
    q, k, v, weight = (jnp.asarray(draw.normal(size=(2, LENGTH, HEADS, 8)), jnp.float32) for _ in range(4))
    table = jnp.asarray(draw.normal(size=(RELATIVE.num_entries, HEADS)), jnp.float32)
    check_values_and_gradients(q, k, v, weight, table)
    check_keys_that_are_not_queries(q, k, v)
    check_ranks_without_common_segments(q, k, v)
    print("done")


if __name__ == "__main__":
    main()
