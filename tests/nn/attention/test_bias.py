"""The relative bias equals its definition in all backends that can add it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_video.core.errors import UserError
from dit_video.models.encoders.t5 import compute_relative_buckets
from dit_video.nn.attention import AttentionInputs, Bias, Full, RelativeBias, TimeOnly
from dit_video.nn.attention.chunked import ChunkedAttention
from dit_video.nn.attention.cudnn import CudnnAttention
from dit_video.nn.attention.dense import DenseAttention
from dit_video.nn.attention.masks import dense_mask, mask_boxes
from dit_video.nn.attention.splash import SplashAttention
from dit_video.tokens import Grid, compute_positions

RELATIVE = RelativeBias(buckets=(8, 4, 6), max_distance=(6, None, None), scale=(2.0, 1.0, 1.0))
SEGMENTS = jnp.asarray([[1] * 12 + [2] * 6 + [0] * 2])
INDICES = np.concatenate([compute_positions(Grid(3, 2, 2)), compute_positions(Grid(1, 2, 3)), np.zeros((2, 3))])[None]
PLACES = np.where(np.arange(20)[:, None] == 5, np.inf, INDICES * np.float32([0.5, 1, 1])).astype(np.float32)
"""Coordinates with time in seconds, two frames at one time, and a register token."""
HEADS, WIDTH = 2, 4
draw = np.random.default_rng(0)
TABLE = draw.normal(size=(RELATIVE.num_entries, HEADS)).astype(np.float32)
ARRAYS = [jnp.asarray(draw.normal(size=(1, 20, HEADS, WIDTH)), jnp.float32) for _ in range(3)]


def make_inputs(table):
    bias = Bias(config=RELATIVE, table=table, q_positions=jnp.asarray(PLACES), kv_positions=jnp.asarray(PLACES))
    return AttentionInputs.self_attention(SEGMENTS, jnp.asarray(INDICES, jnp.int32), bias=bias)


def explicit(pattern):
    """Return JAX's own attention with a bias that is computed pair by pair."""
    entries = np.zeros((3, 20, 20), int)
    for q in range(20):
        for key in range(20):
            step = INDICES[0, key] - INDICES[0, q]
            time = min(abs(int(step[0])), 2)  # of a clip of 3 frames: 0, 1 or 2 steps, in buckets 0, 1 and 2
            entries[:, q, key] = [
                time + 4 * (step[0] > 0),
                8 + min(abs(step[1]), 1) + 2 * (step[1] > 0),
                12 + min(abs(step[2]), 2) + 3 * (step[2] > 0),
            ]
    is_finite = np.isfinite(PLACES[0]).all(axis=-1)

    def attend(q, k, v, inputs):
        added = jnp.moveaxis(inputs.bias.table[entries].sum(axis=0), -1, 0)[None] * (
            is_finite[:, None] & is_finite[None]
        )
        mask = dense_mask(mask_boxes(pattern, inputs))
        mixed = jax.nn.dot_product_attention(q, k, v, bias=added, mask=mask[:, None])
        return jnp.where(mask.any(axis=-1)[..., None, None], mixed, 0)

    return attend


def value_and_gradients(attention):
    @jax.jit
    def run(arrays, table):
        def loss(arrays, table):
            out = attention(*arrays, make_inputs(table))
            return (out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)).sum(), out

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(arrays, table)

    (_, value), (to_arrays, to_table) = run(ARRAYS, TABLE)
    return [value, *to_arrays, to_table]


@pytest.mark.parametrize("pattern", [Full(), pytest.param(TimeOnly(), marks=pytest.mark.nightly)], ids=str)
def test_backends_add_the_bias_of_its_definition_in_values_and_gradients(pattern):
    expected = value_and_gradients(explicit(pattern))
    assert np.abs(np.asarray(expected[-1])).max() > 0.1
    for attention in (DenseAttention(pattern=pattern), ChunkedAttention(pattern=pattern, chunk=6)):
        for ours, theirs in zip(value_and_gradients(attention), expected, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=3e-6, err_msg=str(attention))


@pytest.mark.slow
def test_the_branches_for_accelerators_add_the_same_bias(monkeypatch):
    attentions = DenseAttention(), ChunkedAttention(chunk=6)
    expected = [value_and_gradients(attention) for attention in attentions]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for attention, values in zip(attentions, expected, strict=True):
        for ours, theirs in zip(value_and_gradients(attention), values, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=3e-6)


def test_buckets_are_those_of_t5():
    relative = RelativeBias(buckets=(32, 4, 4), max_distance=(128, None, None))
    places = jnp.zeros((200, 3)).at[:, 0].set(jnp.arange(200))
    result = relative.find_entries(places, places)
    np.testing.assert_array_equal(result[0], compute_relative_buckets(200, buckets=32, max_distance=128))
    assert (np.asarray(result[1]) == 32).all()
    assert (np.asarray(result[2]) == 36).all()


@pytest.mark.slow
def test_memory_is_linear_in_the_row():
    def temporary_bytes(length):
        array = jax.ShapeDtypeStruct((1, length, 1, 4), jnp.float32)
        ids, places = jax.ShapeDtypeStruct((1, length), jnp.int32), jax.ShapeDtypeStruct((1, length, 3), jnp.float32)

        def loss(q, k, v, table, ids, places):
            bias = Bias(config=RELATIVE, table=table, q_positions=places, kv_positions=places)
            return ChunkedAttention(chunk=64)(q, k, v, AttentionInputs.self_attention(ids, bias=bias)).sum()

        table = jax.ShapeDtypeStruct((RELATIVE.num_entries, 1), jnp.float32)
        compiled = jax.jit(jax.grad(loss, (0, 1, 2, 3))).lower(array, array, array, table, ids, places).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(4096) < 2.2 * temporary_bytes(2048)


@pytest.mark.parametrize("attention", [SplashAttention(), CudnnAttention(mask_implementation="xla")], ids=str)
def test_kernels_refuse_a_bias(attention):
    with pytest.raises(UserError, match="cannot add a bias to its scores; use the backend chunked or dense"):
        attention(*ARRAYS, make_inputs(jnp.asarray(TABLE)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"buckets": (7, 8, 8)}, r"\(7, 8, 8\) .* use even numbers"),
        ({"buckets": (2, 8, 8)}, r"\(2, 8, 8\) .* at least 4"),
        ({"buckets": (32, 8, 8), "max_distance": (8, None, None)}, "max_distance=8 is invalid: 32 buckets"),
        ({"scale": (1.0, 0.0, 1.0)}, r"\(1\.0, 0\.0, 1\.0\) .* use positive numbers"),
    ],
)
def test_invalid_relative_biases_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        RelativeBias(**fields)
