"""cuDNN's kernels of attention within segments: their arguments, with emulated kernels, and the programs for GPUs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_video.core.errors import UserError
from dit_video.nn.attention import AttentionInputs, CausalFrames, ContiguousSegments
from dit_video.nn.attention.cudnn import CudnnAttention, compute_segment_ranges
from dit_video.nn.attention.dense import DenseAttention
from support.cudnn_emulation import EMULATED_KERNELS
from support.gpu_programs import list_kernels, lower_for_gpus

LENGTH, HEADS, WIDTH, COUNT = 20, 2, 8, 4
SEGMENTS = jnp.asarray(
    [[1] * 5 + [2] * 9 + [3] * 3 + [0] * 3, [1] * 20, [2] * 6 + [3] * 14, [0] * 20],
    jnp.int32,
)
"""Rows with padding, of one clip, without a first clip, and without any."""
TEXT = jnp.asarray([[1, 1, 0, 2, 3, 3], [1, 0, 0, 0, 0, 0], [3, 3, 3, 0, 4, 4], [1, 2, 3, 4, 0, 0]], jnp.int32)
"""Texts, of which some are shortened, belong to no clip of the row, or are missing."""
CUDNN = CudnnAttention(kernels=EMULATED_KERNELS)


def make_arrays(keys: int = LENGTH, dtype=jnp.float32):
    draw = np.random.default_rng(0)
    shapes = [(len(SEGMENTS), number, HEADS, WIDTH) for number in (LENGTH, keys, keys)]
    return [jnp.asarray(draw.normal(size=shape), dtype) for shape in shapes]


def compute_value_and_gradients(attention, arrays, inputs):
    weights = jnp.asarray(np.random.default_rng(1).normal(size=arrays[0].shape), jnp.float32)

    def loss(arrays):
        out = attention(*arrays, inputs)
        return (out * weights).sum(), out

    gradients, out = jax.jit(jax.grad(loss, has_aux=True))(arrays)
    return [out, *gradients]


@pytest.mark.parametrize("segments", [SEGMENTS, jnp.minimum(SEGMENTS, 1)], ids=["several segments", "one segment"])
@pytest.mark.parametrize("text", [None, TEXT], ids=["self", "cross"])
def test_attention_within_ranges_equals_the_dense_mask_although_the_kernels_leave_the_rest_undefined(segments, text):
    count = int(segments.max())
    text = None if text is None else jnp.where(text <= count, text, 0)
    arrays = make_arrays(LENGTH if text is None else TEXT.shape[1])
    inputs = AttentionInputs(segments, text, contiguous=ContiguousSegments(count))
    expected = compute_value_and_gradients(DenseAttention(), arrays, inputs)
    result = compute_value_and_gradients(CUDNN, arrays, inputs)
    for name, one, other in zip(("value", "q", "k", "v"), result, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6, err_msg=name)


def test_a_segment_sees_no_other_bit_for_bit():
    inputs = AttentionInputs.self_attention(SEGMENTS, segment_count=COUNT)
    arrays = make_arrays()
    changed = [jnp.where((SEGMENTS != 2)[..., None, None], jnp.nan, x) for x in arrays]
    own = np.asarray(SEGMENTS == 2)
    before, after = (CUDNN(*values, inputs) for values in (arrays, changed))
    # The emulation multiplies the values of other segments by zero, which a kernel does not; so only they are changed.
    finite = [changed[0], changed[1], jnp.where(jnp.isnan(changed[2]), 7.0, changed[2])]
    after = CUDNN(*finite, inputs)
    np.testing.assert_array_equal(np.asarray(before)[own], np.asarray(after)[own])


def test_ranges_hold_every_token_of_a_segment_once():
    ranges = compute_segment_ranges(AttentionInputs(SEGMENTS, TEXT), COUNT)
    for row, (segments, text) in enumerate(zip(np.asarray(SEGMENTS), np.asarray(TEXT), strict=True)):
        for index in range(COUNT):
            keys, queries = (np.flatnonzero(ids == index + 1) for ids in (text, segments))
            q_start, q_length, kv_start, kv_length = (
                int(each[row, index])
                for each in (ranges.q_offsets, ranges.q_lengths, ranges.kv_offsets, ranges.kv_lengths)
            )
            np.testing.assert_array_equal(range(kv_start, kv_start + kv_length), keys)
            np.testing.assert_array_equal(range(q_start, q_start + q_length), queries if len(keys) else [])


def lower_gradients(attention, inputs, arrays) -> str:
    def loss(q, k, v, inputs):
        return attention(q, k, v, inputs).astype(jnp.float32).sum()

    return lower_for_gpus(jax.grad(loss, (0, 1, 2)), *arrays, inputs)


@pytest.mark.parametrize("text", [None, TEXT], ids=["self", "cross"])
@pytest.mark.parametrize("count", [COUNT, 1])
def test_the_program_for_gpus_has_the_packed_kernels_and_no_mask(text, count):
    arrays = make_arrays(LENGTH if text is None else TEXT.shape[1], jnp.bfloat16)
    program = lower_gradients(
        CudnnAttention(), AttentionInputs(SEGMENTS, text, contiguous=ContiguousSegments(count)), arrays
    )
    kernels = list_kernels(program)
    assert set(kernels) == {"__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"}
    for settings in kernels.values():
        assert settings["max_seg_per_batch"] == count
        assert settings["mask_type"] == "PADDING"
        assert settings["fmha_scale"] == pytest.approx(WIDTH**-0.5)
        assert settings["dropout_rate"] == 0
    # Nothing is as large as the scores of a row.
    assert f"x{LENGTH}x{arrays[1].shape[1]}x" not in program


def test_another_pattern_is_computed_with_the_mask():
    arrays = make_arrays(dtype=jnp.bfloat16)
    places = jnp.tile(jnp.arange(LENGTH, dtype=jnp.int32)[None, :, None], (len(SEGMENTS), 1, 3))
    inputs = AttentionInputs.self_attention(SEGMENTS, places, segment_count=COUNT)
    kernels = list_kernels(lower_gradients(CudnnAttention(pattern=CausalFrames()), inputs, arrays))
    assert set(kernels) == {"__cudnn$fmhaScaleBiasSoftmax", "__cudnn$fmhaScaleBiasSoftmaxBackward"}


@pytest.mark.parametrize("count", [None, COUNT])
def test_inputs_of_32_bits_are_refused(count):
    with pytest.raises(UserError, match="bfloat16 or float16, not float32"):
        CudnnAttention()(*make_arrays(), AttentionInputs.self_attention(SEGMENTS, segment_count=count))


def test_fewer_heads_of_keys_than_of_queries_are_refused():
    q, k = jnp.zeros((1, LENGTH, 4, 16), jnp.bfloat16), jnp.zeros((1, LENGTH, 2, 16), jnp.bfloat16)
    with pytest.raises(UserError, match="4 heads of queries and 2 of keys"):
        CudnnAttention()(q, k, k, AttentionInputs.self_attention(SEGMENTS[:1], segment_count=COUNT))
