"""Records of attention weights, which attention itself does not keep."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_video.nn.attention import AttentionInputs, Bias, Full, RecordedAttention, RelativeBias, SparseCausal
from dit_video.nn.attention.chunked import ChunkedAttention
from dit_video.nn.attention.dense import DenseAttention, compute_attention_weights
from dit_video.tokens import Grid, compute_positions

SEGMENTS = jnp.asarray([[1] * 12 + [2] * 6 + [0] * 2])
PLACES = np.concatenate([compute_positions(Grid(3, 2, 2)), compute_positions(Grid(1, 2, 3)), np.zeros((2, 3))])[None]
draw = np.random.default_rng(0)
Q, K, V = (jnp.asarray(draw.normal(size=(1, 20, 2, 4)), jnp.float32) for _ in range(3))
RELATIVE = RelativeBias(buckets=(4, 4, 4), max_distance=(None, None, None))
TABLE = jnp.asarray(draw.normal(size=(RELATIVE.num_entries, 2)), jnp.float32)


def make_inputs(*, biased=False):
    bias = None
    if biased:
        where = jnp.asarray(PLACES, jnp.float32)
        bias = Bias(config=RELATIVE, table=TABLE, q_positions=where, kv_positions=where)
    return AttentionInputs.self_attention(SEGMENTS, jnp.asarray(PLACES, jnp.int32), bias=bias)


@pytest.mark.parametrize("pattern", [Full(), SparseCausal()], ids=repr)
@pytest.mark.parametrize("biased", [False, True], ids=["", "biased"])
def test_the_weights_mix_values_as_attention_does(pattern, biased):
    weights = compute_attention_weights(Q, K, make_inputs(biased=biased), pattern=pattern)
    mixed = jnp.einsum("bknm,bmkd->bnkd", weights, V)
    np.testing.assert_allclose(mixed, DenseAttention(pattern=pattern)(Q, K, V, make_inputs(biased=biased)), atol=2e-6)
    np.testing.assert_allclose(weights[:, :, :18].sum(axis=-1), 1, atol=1e-6)
    assert (weights[:, :, 18:] == 0).all()


@pytest.mark.slow
def test_a_record_is_of_the_chosen_queries_and_changes_nothing():
    result = []
    attention = ChunkedAttention(pattern=SparseCausal(), chunk=8)
    recorded = RecordedAttention(attention=attention, pattern=SparseCausal(), queries=(3, 9, 19), record=result.append)

    @jax.jit
    def twice(q):
        """Attend in a loop of a compiled program, with other queries each time."""
        return jax.lax.scan(lambda q, _: (recorded(q, K, V, make_inputs(biased=True)), None), q, None, length=2)[0]

    after = jax.block_until_ready(twice(Q))
    jax.effects_barrier()
    once = attention(Q, K, V, make_inputs(biased=True))
    np.testing.assert_allclose(after, attention(once, K, V, make_inputs(biased=True)), atol=1e-6)
    assert len(result) == 2
    for weights, queries in zip(result, (Q, once), strict=True):
        expected = compute_attention_weights(queries, K, make_inputs(biased=True), pattern=SparseCausal())
        np.testing.assert_allclose(weights, expected[:, :, np.asarray([3, 9, 19])], atol=1e-6)
