"""Emulation of cuDNN's kernels of attention within segments, which reads nothing but their ranges.

Whatever the kernels leave undefined is NaN.
"""

import jax
import jax.numpy as jnp

from dit_video.nn.attention.cudnn import PackedKernels, SegmentRanges


def find_segments(offsets, lengths, tokens: int):
    """Return the number of the segment, from 0 on, whose range a token lies in; -1 outside of all ranges."""
    index = jnp.arange(tokens)[None, :, None]
    is_member = (index >= offsets[:, None]) & (index < (offsets + lengths)[:, None])
    return jnp.where(is_member.any(axis=-1), is_member.argmax(axis=-1), -1)


def compute_scores(q, k, ranges: SegmentRanges):
    """Return masked scores `B K N M` in float32, and the segments of queries and keys."""
    q_segments = find_segments(ranges.q_offsets, ranges.q_lengths, q.shape[1])
    kv_segments = find_segments(ranges.kv_offsets, ranges.kv_lengths, k.shape[1])
    is_seen = (q_segments[:, :, None] == kv_segments[:, None]) & (q_segments[:, :, None] >= 0)
    scores = jnp.einsum("bnkd,bmkd->bknm", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    return jnp.where(is_seen[:, None], scores, -jnp.inf), q_segments, kv_segments


def set_undefined(values, segments):
    """Return values that are NaN outside of all segments."""
    return jnp.where((segments >= 0)[..., None, None], values, jnp.nan)


def forward(q, k, v, ranges: SegmentRanges):
    scores, q_segments, _ = compute_scores(q, k, ranges)
    lse = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.where(jnp.isfinite(lse)[..., None], jnp.exp(scores - lse[..., None]), 0)
    out = jnp.einsum("bknm,bmkd->bnkd", weights, v, preferred_element_type=jnp.float32).astype(v.dtype)
    return set_undefined(out, q_segments), lse


def backward(q, k, v, ranges: SegmentRanges, lse, out, d_out):
    scores, q_segments, kv_segments = compute_scores(q, k, ranges)
    weights = jnp.where(jnp.isfinite(lse)[..., None], jnp.exp(scores - lse[..., None]), 0)
    delta = jnp.einsum("bnkd,bnkd->bkn", out, d_out)
    d_scores = weights * (jnp.einsum("bnkd,bmkd->bknm", d_out, v) - delta[..., None]) * q.shape[-1] ** -0.5
    d_q = jnp.einsum("bknm,bmkd->bnkd", d_scores, k).astype(q.dtype)
    d_k = jnp.einsum("bknm,bnkd->bmkd", d_scores, q).astype(k.dtype)
    d_v = jnp.einsum("bknm,bnkd->bmkd", weights, d_out).astype(v.dtype)
    return set_undefined(d_q, q_segments), set_undefined(d_k, kv_segments), set_undefined(d_v, kv_segments)


EMULATED_KERNELS = PackedKernels(forward, backward)
