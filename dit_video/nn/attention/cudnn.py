"""GPU backend: cuDNN's fused attention, which skips pairs of different segments if segments are contiguous.

In cuDNN's packed layout a row is a list of segments, each with a length and an offset, and the kernel starts one
problem per segment. The work grows with the sum of squared lengths in both passes. JAX's public functions do not expose
residuals that a remat policy could keep, so this module calls the forward and the backward kernel under a `custom_vjp`.

The project's tests emulate the kernels and lower the program for GPUs. `tools/gpu_benchmark.py` compares the kernels
themselves with the dense reference on a GPU. On several devices, call the backend under `jax.shard_map`.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dit_video.core.errors import UserError
from dit_video.nn.attention.api import AttentionInputs, Keys, Queries, mark_checkpoint, name_calls
from dit_video.nn.attention.masks import Full, Pattern, dense_mask, mask_boxes

MAX_HEAD_WIDTH = 256
"""Largest head width that the kernels support from Hopper on; a width must be a multiple of 8."""


class SegmentRanges(NamedTuple):
    """Token ranges of G segments, among the queries and among the keys of each row."""

    q_lengths: Int[Array, "B G"]
    """Number of queries of each segment; 0 for a segment that has no keys, whose queries see nothing."""
    kv_lengths: Int[Array, "B G"]
    q_offsets: Int[Array, "B G"]
    """Index in the row of each segment's first query."""
    kv_offsets: Int[Array, "B G"]


PackedForward = Callable[[Queries, Keys, Keys, SegmentRanges], tuple[Queries, Array]]
"""Function of queries, keys, values and ranges that returns the output and the residuals of the softmax. The outputs
are undefined for queries outside all ranges."""
PackedBackward = Callable[[Queries, Keys, Keys, SegmentRanges, Array, Queries, Queries], tuple[Queries, Keys, Keys]]
"""Function of queries, keys, values, ranges, residuals, output and the output's gradient. It returns the gradients of
queries, keys and values, which are undefined outside all ranges."""


class PackedKernels(NamedTuple):
    """Kernels of attention within segments."""

    forward: PackedForward
    backward: PackedBackward


def compute_segment_ranges(inputs: AttentionInputs, count: int) -> SegmentRanges:
    """Return the ranges of segments 1 to `count`, which are contiguous."""

    def measure(segments: Int[Array, "B N"]) -> tuple[Int[Array, "B G"], Int[Array, "B G"]]:
        is_member = segments[..., None] == jnp.arange(1, count + 1)
        return is_member.sum(axis=1, dtype=jnp.int32), is_member.argmax(axis=1).astype(jnp.int32)

    q_lengths, q_offsets = measure(inputs.q_segments)
    if inputs.context_segments is None:
        return SegmentRanges(q_lengths, q_lengths, q_offsets, q_offsets)
    kv_lengths, kv_offsets = measure(inputs.context_segments)
    # The kernel must not compute a softmax over no scores.
    return SegmentRanges(jnp.where(kv_lengths > 0, q_lengths, 0), kv_lengths, q_offsets, kv_offsets)


def _cudnn() -> Any:
    """Return JAX's module for cuDNN's attention."""
    from jax._src.cudnn import fused_attention_stablehlo  # Imported here: only GPUs need it.

    return fused_attention_stablehlo


def _check_dtype(q: Queries) -> None:
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise UserError(f"cuDNN attention supports bfloat16 or float16, not {q.dtype}; set the model's dtype")


def _make_operands(ranges: SegmentRanges) -> tuple[Array | None, ...]:
    """Return the lengths of queries and keys, then their offsets, as JAX's function takes them.

    It expects one more column of offsets than of lengths, and ignores negative values. With one segment per row the
    layout is not packed and has no offsets.
    """
    if ranges.q_lengths.shape[1] == 1:
        return ranges.q_lengths[:, 0], ranges.kv_lengths[:, 0], None, None
    offsets = (jnp.pad(each, ((0, 0), (0, 1)), constant_values=-1) for each in (ranges.q_offsets, ranges.kv_offsets))
    return ranges.q_lengths, ranges.kv_lengths, *offsets


def _forward_kernel(q: Queries, k: Keys, v: Keys, ranges: SegmentRanges) -> tuple[Queries, Array]:
    _check_dtype(q)
    cudnn = _cudnn()
    q_lengths, kv_lengths, q_offsets, kv_offsets = _make_operands(ranges)
    return cudnn.dot_product_attention(
        q,
        k,
        v,
        q_seqlen=q_lengths,
        kv_seqlen=kv_lengths,
        q_offsets=q_offsets,
        kv_offsets=kv_offsets,
        scale=q.shape[-1] ** -0.5,
        mask_type=cudnn.MaskType.PADDING,
        return_residual=True,
    )


def _backward_kernel(
    q: Queries, k: Keys, v: Keys, ranges: SegmentRanges, residuals: Array, out: Queries, d_out: Queries
) -> tuple[Queries, Keys, Keys]:
    cudnn = _cudnn()
    unused = jnp.zeros(0, q.dtype)
    operands = [unused if each is None else each for each in _make_operands(ranges)]
    rule = cudnn._dot_product_attention_bwd_rule
    # From jax 0.12 on a function may change the scores: it and its arguments are two more values, here none.
    no_function, no_arguments = ([None], [()]) if "score_mod" in inspect.signature(rule).parameters else ([], [])
    saved = (q, k, v, unused, *operands, unused, unused, *no_arguments, residuals, out)
    gradients = rule(
        q.shape[-1] ** -0.5,  # scale
        0,  # seed of the dropout
        0.0,  # dropout rate
        (False, False),  # neither a bias nor its gradient
        cudnn.MaskType.PADDING,
        cudnn.AttentionLayout.BTNH.value,
        None,  # length of the sliding window
        *no_function,
        cudnn.check_cudnn_version(),
        False,  # the residuals are no output
        saved,
        d_out,
    )
    return gradients[:3]


CUDNN_KERNELS = PackedKernels(_forward_kernel, _backward_kernel)
"""Kernels of cuDNN. Several segments per row need compute capability 9.0 (Hopper), one needs 8.0."""


@dataclass(frozen=True, kw_only=True)
class CudnnAttention:
    """cuDNN's fused attention, in bfloat16 or float16.

    Full attention within contiguous segments (`AttentionInputs.segment_count`) skips all pairs of different segments.
    Any other pattern or order uses the dense mask: JAX passes it to cuDNN as a bias of N × M values, shared by all
    heads, so memory is quadratic in the row and no block is skipped.
    """

    pattern: Pattern = Full()
    kernels: PackedKernels = field(default=CUDNN_KERNELS, repr=False)
    """Kernels of attention within segments; tests replace them."""
    mask_implementation: Literal["cudnn", "xla"] = "cudnn"
    """JAX's implementation of attention with a mask; "xla" runs on any platform and is meant for tests."""

    @name_calls("cudnn")
    def __call__(self, q: Queries, k: Keys, v: Keys, inputs: AttentionInputs) -> Queries:
        inputs.require_no_bias("cudnn")
        if q.shape[2] != k.shape[2]:
            given = f"{q.shape[2]} heads of queries and {k.shape[2]} of keys"
            rule = "up to 0.11.0 JAX returns wrong values for them in packed rows"
            raise UserError(f"cuDNN attention does not take {given}: {rule}. Repeat the keys and values of each head.")
        if isinstance(self.pattern, Full) and inputs.segment_count is not None:
            ranges = compute_segment_ranges(inputs, inputs.segment_count)
            return _attend(self.kernels, q, k, v, ranges, inputs.q_segments, inputs.kv_segments)
        if self.mask_implementation == "cudnn":
            _check_dtype(q)
        mask = dense_mask(mask_boxes(self.pattern, inputs))
        mixed = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], implementation=self.mask_implementation)
        return jnp.where(mask.any(axis=-1)[..., None, None], mixed, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    kernels: PackedKernels,
    q: Queries,
    k: Keys,
    v: Keys,
    ranges: SegmentRanges,
    q_segments: Int[Array, "B N"],
    kv_segments: Int[Array, "B M"],
) -> Queries:
    return _forward(kernels, q, k, v, ranges, q_segments, kv_segments)[0]


def _forward(kernels, q, k, v, ranges, q_segments, kv_segments):
    out, residuals = kernels.forward(q, k, v, ranges)
    # Values that the kernels leave undefined may be NaN, so they are replaced, not multiplied by zero.
    out = _zero_outside(out, _is_inside(q_segments, ranges.q_lengths))
    out, residuals = mark_checkpoint((out, residuals), queries=q.shape[1], keys=k.shape[1])
    return out, (q, k, v, ranges, q_segments, kv_segments, out, residuals)


def _backward(kernels, saved, d_out):
    q, k, v, ranges, q_segments, kv_segments, out, residuals = saved
    d_q, d_k, d_v = kernels.backward(q, k, v, ranges, residuals, out, d_out)
    # A segment without queries passes no gradient to its keys, whatever the kernels write there.
    has_queries = jnp.where(ranges.q_lengths > 0, ranges.kv_lengths, 0)
    is_seen = _is_inside(kv_segments, has_queries)
    d_q = _zero_outside(d_q, _is_inside(q_segments, ranges.q_lengths))
    return d_q, _zero_outside(d_k, is_seen), _zero_outside(d_v, is_seen), None, None, None


_attend.defvjp(_forward, _backward)


def _is_inside(segments: Int[Array, "B N"], lengths: Int[Array, "B G"]) -> Bool[Array, "B N"]:
    """Return whether tokens belong to a segment whose length is not zero."""
    is_used = jnp.take_along_axis(lengths > 0, jnp.maximum(segments - 1, 0), axis=1)
    return is_used & (segments > 0)


def _zero_outside(values: Float[Array, "B N K d"], is_inside: Bool[Array, "B N"]) -> Float[Array, "B N K d"]:
    return jnp.where(is_inside[..., None, None], values, 0)
