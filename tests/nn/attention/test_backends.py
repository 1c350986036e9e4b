import dataclasses
import importlib.util
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_video.core.errors import UserError
from dit_video.core.platform.devices import Platform
from dit_video.nn.attention import (
    AttentionInputs,
    CausalFrames,
    Full,
    SlidingWindow,
    SpaceOnly,
    SparseCausal,
    SplashBlocks,
    TimeOnly,
    WithGlobalTokens,
    choose_block_size,
    make_attention,
)
from dit_video.nn.attention.chunked import ChunkedAttention
from dit_video.nn.attention.cudnn import CudnnAttention
from dit_video.nn.attention.dense import DenseAttention
from dit_video.nn.attention.dispatch import AutoAttention
from dit_video.nn.attention.masks import dense_mask, mask_boxes
from dit_video.nn.attention.splash import SplashAttention
from dit_video.nn.attention.tokamax import TokamaxAttention
from dit_video.tokens import Grid, compute_positions
from support.marks import mark_slow_except

PATTERNS = [
    Full(),
    SpaceOnly(),
    TimeOnly(),
    CausalFrames(),
    CausalFrames(chunk=2),
    WithGlobalTokens(pattern=CausalFrames(), globals_see_all=False),
    SparseCausal(),
    SlidingWindow(radius=(1, 1, 1)),
    SlidingWindow(radius=(None, 0, 0), tile=(1, 2, 2)),
]
QUICK = (Full(),)
"""Patterns of the default suite."""
SMALL_BLOCKS = SplashBlocks(block_q=128, block_kv=128)
BACKENDS = {
    "chunked": ChunkedAttention(chunk=5),
    "one block": ChunkedAttention(chunk=64),
    "splash": SplashAttention(blocks=SMALL_BLOCKS, interpret=True),
    "cudnn with a mask": CudnnAttention(mask_implementation="xla"),
}
if importlib.util.find_spec("tokamax") is not None:
    BACKENDS["tokamax"] = TokamaxAttention(implementation="xla")

GRIDS = [[Grid(3, 2, 3), Grid(2, 2, 2), Grid(1, 1, 2)], [Grid(4, 2, 3), Grid(1, 2, 2)]]
LENGTH, HEADS, WIDTH = 31, 2, 4


def rows():
    """Return segments and grid indices of a row of clips and an image, and of a row of shuffled clips."""
    draw = np.random.default_rng(0)
    segments, places = np.zeros((2, LENGTH), np.int32), np.zeros((2, LENGTH, 3), np.int32)
    for row, grids in enumerate(GRIDS):
        end = 0
        for number, grid in enumerate(grids):
            start, end = end, end + grid.volume
            segments[row, start:end], places[row, start:end] = number + 1, compute_positions(grid)
    shuffled = draw.permutation(LENGTH)
    segments[1], places[1] = segments[1, shuffled], places[1, shuffled]
    return jnp.asarray(segments), jnp.asarray(places)


SEGMENTS, INDICES = rows()
CONTEXT_SEGMENTS = jnp.asarray([[1, 1, 2, 4, 4, 4, 0], [2] * 7])
"""Segments of a text: the third clip of the first row and the first of the second have none."""
WITHOUT_COORDINATES = np.random.default_rng(1).uniform(size=(2, LENGTH, 1)) < 0.2
"""Tokens without coordinates, for the patterns that support them."""
SELF_ATTENTION, CONTEXT = AttentionInputs.self_attention(SEGMENTS, INDICES), AttentionInputs(SEGMENTS, CONTEXT_SEGMENTS)


def inputs(keys: int = LENGTH, width: int = WIDTH, seed: int = 0):
    draw = np.random.default_rng(seed)
    return [jnp.asarray(draw.normal(size=(2, number, HEADS, width)), jnp.float32) for number in (LENGTH, keys, keys)]


def reference(pattern):
    """Return JAX's own attention under the dense mask, with zeros for queries that see nothing."""

    def attend(q, k, v, metadata):
        mask = dense_mask(mask_boxes(pattern, metadata))
        mixed = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])
        return jnp.where(mask.any(axis=-1)[..., None, None], mixed, 0)

    return attend


def value_and_gradients(attention, arrays, metadata=SELF_ATTENTION):
    weights = jnp.asarray(np.random.default_rng(9).normal(size=arrays[0].shape), jnp.float32)

    @jax.jit
    def run(arrays):
        def loss(arrays):
            out = attention(*arrays, metadata)
            return (out * weights).sum(), out

        return jax.grad(loss, has_aux=True)(arrays)

    gradients, value = run(arrays)
    return [value, *gradients]


def same(left, right, *, atol=2e-6, about=""):
    for name, ours, theirs in zip(("value", "q", "k", "v"), left, right, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=atol, err_msg=f"{about} {name}")


@pytest.mark.parametrize("pattern", mark_slow_except(QUICK, PATTERNS), ids=str)
def test_every_backend_equals_the_dense_mask_in_values_and_gradients(pattern):
    arrays, metadata = inputs(), SELF_ATTENTION
    if isinstance(pattern, WithGlobalTokens):
        metadata = AttentionInputs.self_attention(SEGMENTS, jnp.where(WITHOUT_COORDINATES, -1, INDICES))
    expected = value_and_gradients(reference(pattern), arrays, metadata)
    same(value_and_gradients(DenseAttention(pattern=pattern), arrays, metadata), expected, about="dense")
    for name, backend in BACKENDS.items():
        try:
            attention = dataclasses.replace(backend, pattern=pattern)
        except UserError:
            assert name in ("splash", "tokamax")
            assert pattern.locality == "boxes"
            continue
        same(value_and_gradients(attention, arrays, metadata), expected, about=name)


@pytest.mark.slow
def test_texts_are_seen_by_their_own_segments_and_a_segment_without_text_gets_zeros():
    arrays = inputs(CONTEXT_SEGMENTS.shape[1])
    expected = value_and_gradients(reference(Full()), arrays, CONTEXT)
    for name, attention in {"dense": DenseAttention(), **BACKENDS}.items():
        result = value_and_gradients(attention, arrays, CONTEXT)
        same(result, expected, about=name)
        without = np.asarray((jnp.asarray([[3], [1]]) == SEGMENTS) | (SEGMENTS == 0))
        assert (np.asarray(result[0])[without] == 0).all(), name
        assert (np.asarray(result[0])[~without] != 0).all(), name


@pytest.mark.parametrize("pattern", [Full(), CausalFrames()], ids=str)
def test_packed_clips_equal_each_clip_alone(pattern):
    arrays = inputs()
    packed = value_and_gradients(ChunkedAttention(pattern=pattern, chunk=5), arrays)
    weights = jnp.asarray(np.random.default_rng(9).normal(size=arrays[0].shape), jnp.float32)

    @jax.jit
    def alone(clip, places, weights):
        def loss(clip):
            ids = jnp.ones((1, places.shape[1]), jnp.int32)
            out = DenseAttention(pattern=pattern)(*clip, AttentionInputs.self_attention(ids, places))
            return (out * weights).sum(), out

        return jax.grad(loss, has_aux=True)(clip)

    for row, number in ((0, 1), (0, 2), (1, 1)):
        own = np.flatnonzero(np.asarray(SEGMENTS)[row] == number)
        gradients, value = alone([x[row, own][None] for x in arrays], INDICES[row, own][None], weights[row, own][None])
        same([x[row, own][None] for x in packed], [value, *gradients])


@pytest.mark.parametrize(
    "attention",
    [
        DenseAttention(),
        ChunkedAttention(chunk=5),
        ChunkedAttention(chunk=5, pattern=SparseCausal()),
        SplashAttention(blocks=SMALL_BLOCKS, interpret=True),
        pytest.param(
            SplashAttention(blocks=SMALL_BLOCKS, interpret=True, pattern=CausalFrames()), marks=pytest.mark.slow
        ),
    ],
    ids=str,
)
def test_a_segment_sees_no_other_bit_for_bit(attention):
    arrays = inputs()
    changed = [jnp.where((SEGMENTS != 2)[..., None, None], 7.0 * x + 3.0, x) for x in arrays]
    own = np.asarray(SEGMENTS == 2)
    before, after = (value_and_gradients(attention, values) for values in (arrays, changed))
    for left, right in zip(before, after, strict=True):
        np.testing.assert_array_equal(np.asarray(left)[own], np.asarray(right)[own])
    others = np.asarray(SEGMENTS == 1)
    assert (np.asarray(before[0])[others] != np.asarray(after[0])[others]).any()


def test_the_branches_for_accelerators_equal_those_for_cpu(monkeypatch):
    arrays = inputs()
    expected = [value_and_gradients(attention, arrays) for attention in (DenseAttention(), ChunkedAttention(chunk=5))]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for attention, values in zip((DenseAttention(), ChunkedAttention(chunk=5)), expected, strict=True):
        same(value_and_gradients(attention, arrays), values, about=str(attention))


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [(12, 7, 2, 5, 5), (3,) * 10 + (1,), (31,), (1, 16, 14)], ids=str)
def test_blocks_that_begin_with_segments_equal_the_dense_mask(lengths):
    ids = jnp.asarray(np.repeat(np.arange(len(lengths)), lengths)[None] + [[1], [0]], jnp.int32)  # one without padding
    arrays, weights = inputs(), jnp.asarray(np.random.default_rng(9).normal(size=(2, LENGTH, HEADS, WIDTH)))

    def gradients(attention):
        return jax.jit(
            jax.value_and_grad(
                lambda *x: (attention(*x, AttentionInputs.self_attention(ids)) * weights).sum(), (0, 1, 2)
            )
        )

    value, expected = gradients(DenseAttention())(*arrays)
    for chunk in (2, 4):
        result, theirs = gradients(ChunkedAttention(chunk=chunk, platform="cpu"))(*arrays)
        np.testing.assert_allclose(result, value, rtol=1e-5, atol=1e-5)
        for left, right in zip(theirs, expected, strict=True):
            np.testing.assert_allclose(left, right, atol=2e-6)


def test_equal_scores_average_the_values_of_a_segment():
    q = jnp.zeros((1, 3, 1, 4))
    v = jnp.arange(12.0).reshape(1, 3, 1, 4)
    segments = jnp.asarray([[1, 1, 2]])
    out = DenseAttention()(q, v, v, AttentionInputs.self_attention(segments))
    np.testing.assert_allclose(out[0, :, 0], [[2, 3, 4, 5], [2, 3, 4, 5], [8, 9, 10, 11]], rtol=1e-6)


@pytest.mark.parametrize("attention", [DenseAttention(), ChunkedAttention(chunk=5)], ids=str)
def test_large_scores_stay_finite(attention):
    q, k, v = inputs()
    for x in value_and_gradients(attention, [1e3 * q, 1e3 * k, v]):
        assert np.isfinite(x).all()


@pytest.mark.parametrize(
    "attention", [DenseAttention(), pytest.param(ChunkedAttention(chunk=5), marks=pytest.mark.slow)], ids=str
)
def test_bfloat16_has_a_float32_softmax(attention):
    arrays = [x.astype(jnp.bfloat16) for x in inputs()]
    result = value_and_gradients(attention, arrays)
    exact = value_and_gradients(attention, [x.astype(jnp.float32) for x in arrays])
    for x, right in zip(result, exact, strict=True):
        assert x.dtype == jnp.bfloat16
        assert np.abs(np.asarray(x, np.float32) - right).max() < 0.04


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [Full(), SlidingWindow(radius=(1, 1, 1))], ids=str)
def test_memory_is_linear_in_the_row(pattern):
    def temporary_bytes(attention, length):
        array = jax.ShapeDtypeStruct((1, length, 1, 4), jnp.float32)
        ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
        places = jax.ShapeDtypeStruct((1, length, 3), jnp.int32)

        def loss(q, k, v, ids, places):
            return attention(q, k, v, AttentionInputs.self_attention(ids, places)).sum()

        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(array, array, array, ids, places).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    chunked, dense = ChunkedAttention(pattern=pattern, chunk=64), DenseAttention(pattern=pattern)
    assert temporary_bytes(dense, 2048) > 3.5 * temporary_bytes(dense, 1024)
    assert temporary_bytes(chunked, 4096) < 2.2 * temporary_bytes(chunked, 2048)
    assert temporary_bytes(chunked, 2048) < temporary_bytes(dense, 2048) / 8


def test_foreign_blocks_are_not_computed():
    """A NaN among the values of another segment is never read unless a block holds both segments."""
    segments = jnp.repeat(jnp.asarray([[1, 2, 1, 3]]), 8, axis=1)
    q, k, v = (jnp.asarray(np.random.default_rng(1).normal(size=(1, 32, 1, 4)), jnp.float32) for _ in range(3))
    poisoned = jnp.where((segments == 2)[..., None, None], jnp.nan, v)
    out = ChunkedAttention(chunk=4)(q, k, poisoned, AttentionInputs.self_attention(segments))
    assert np.isnan(out[0, 8:16]).all()
    assert np.isfinite(np.delete(out[0], np.s_[8:16], axis=0)).all()


def test_make_attention_builds_backends_by_name():
    assert make_attention("dense") == DenseAttention()
    assert make_attention("chunked", chunk=64) == ChunkedAttention(chunk=64)
    tpu = Platform("tpu")
    assert make_attention("auto", chunk=64, platform=tpu) == AutoAttention(chunk=64, platform=tpu)
    assert make_attention() == make_attention("auto")
    assert make_attention("splash", pattern=TimeOnly()) == SplashAttention(pattern=TimeOnly())
    blocks = SplashBlocks(block_q=256, use_fused_bwd_kernel=True)
    assert make_attention(blocks) == SplashAttention(blocks=blocks)
    assert (choose_block_size(8191), choose_block_size(8192)) == (512, 1024)
    assert make_attention("cudnn", pattern=SparseCausal()) == CudnnAttention(pattern=SparseCausal())
    # Attention has value equality, so that equal models have equal graphs and share a program.
    assert hash(make_attention()) == hash(make_attention())


def test_auto_is_dense_for_short_rows_and_chunked_for_long_ones():
    def program(attention):
        return str(jax.make_jaxpr(lambda *arrays: attention(*arrays, SELF_ATTENTION))(*inputs()))

    short, long = DenseAttention(pattern=SpaceOnly()), ChunkedAttention(pattern=SpaceOnly(), chunk=7)
    assert program(make_attention("auto", pattern=SpaceOnly(), chunk=8)) == program(short)
    assert program(make_attention("auto", pattern=SpaceOnly(), chunk=7)) == program(long)
    assert program(short) != program(long)


def test_cudnn_attention_refuses_32_bit_inputs():
    with pytest.raises(UserError, match="bfloat16 or float16, not float32"):
        CudnnAttention()(*inputs(), SELF_ATTENTION)


def test_a_missing_tokamax_is_reported_with_its_installation(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokamax", None)
    monkeypatch.setitem(sys.modules, "tokamax._src.ops.attention", None)
    with pytest.raises(UserError, match="pip install tokamax, or use"):
        make_attention("tokamax")
