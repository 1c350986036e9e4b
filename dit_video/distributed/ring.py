"""Ring attention: keys and values rotate through the devices that share a row (arXiv 2310.01889).

Every device keeps its own queries. In each of `ranks` steps it attends to the keys that it currently holds and merges
the result by an online softmax, while these keys are sent to the next device. Keys without a common segment are passed
on without a product. The backward pass rotates once more, together with the gradients of keys and values in float32. It
starts at the neighbour, which saves one hop: a device needs no communication for its own keys. So a device sends
`(ranks - 1) (2 b + 2 (b + 4))` bytes per value of its keys, with `b` bytes in the model's dtype.

Called under `jax.shard_map`, with the tokens of one rank.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from dit_video.nn.attention import AttentionInputs, Bias, Full, Pattern, RelativeBias
from dit_video.nn.attention.api import Keys, Queries, mark_checkpoint
from dit_video.nn.attention.backends.chunked import EMPTY_LSE, attend_part, compute_part_gradients

_MAX_SEGMENT = int(np.iinfo(np.int32).max)


@dataclass(frozen=True)
class RingAttention:
    """Attention among the tokens of a row on `ranks` devices along the mesh axis `axis`.

    Blocks of `chunk` queries by `chunk` keys are computed as by the backend `chunked`, for every pattern.
    """

    axis: str
    ranks: int
    pattern: Pattern = Full()
    chunk: int = 256

    def __call__(self, q: Queries, k: Keys, v: Keys, inputs: AttentionInputs) -> Queries:
        """Return the attention of this rank's `q`, `k` and `v`; `meta` is that of the whole row."""
        bias = inputs.bias
        if bias is None:
            return _ring_attention(self, None, q, k, v, None, inputs)
        # The gradient of the table is computed separately.
        without_table = inputs._replace(bias=replace(bias, table=jnp.zeros((0, 0))))
        return _ring_attention(self, bias.config, q, k, v, bias.table, without_table)

    def send_to_next(self, arrays: PyTree) -> PyTree:
        """Send arrays to the next rank."""
        pairs = [(rank, (rank + 1) % self.ranks) for rank in range(self.ranks)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axis, pairs), arrays)

    def select_tokens(
        self, relative: RelativeBias | None, table: Array | None, inputs: AttentionInputs, steps: Int[Array, ""] | int
    ) -> AttentionInputs:
        """Return the tokens of this rank's queries, and of the keys that started `steps` ranks behind."""
        rank = jax.lax.axis_index(self.axis)
        source = (rank - steps) % self.ranks

        def part(rows, index):
            size = 0 if rows is None else rows.shape[1] // self.ranks
            return None if rows is None else jax.lax.dynamic_slice_in_dim(rows, index * size, size, axis=1)

        bias = None
        if inputs.bias is not None:
            assert relative is not None
            assert table is not None
            positions = part(inputs.bias.q_positions, rank), part(inputs.bias.kv_positions, source)
            bias = Bias(config=relative, table=table, q_positions=positions[0], kv_positions=positions[1])
        return AttentionInputs(
            part(inputs.q_segments, rank),
            part(inputs.kv_segments, source),
            part(inputs.q_indices, rank),
            part(inputs.kv_indices, source),
            bias,
        )


def _has_common_segments(inputs: AttentionInputs) -> Bool[Array, ""]:
    """Return whether the ranges of segment ids of queries and keys overlap in any row."""
    min_segment, max_segment = _get_segment_range(inputs.q_segments)
    key_min, key_max = _get_segment_range(inputs.kv_segments)
    return ((min_segment <= key_max) & (key_min <= max_segment)).any()


def _get_segment_range(segments: Int[Array, "B N"]) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
    """Return the smallest and the largest segment of each row; the range is empty if there is only padding."""
    return jnp.where(segments > 0, segments, _MAX_SEGMENT).min(axis=1), segments.max(axis=1)


class _PartialAttention(NamedTuple):
    """Attention over the keys so far, and the logarithms of the sums of exponentials; float32."""

    out: Queries
    lse: Float[Array, "B K N"]

    def merge(self, other: "_PartialAttention") -> "_PartialAttention":
        """Return the attention over the keys of both parts."""
        # The log-sum-exp of no keys is `NOTHING`, a large positive number that makes exp(score - lse) zero in the
        # backward pass. For the weights of the merge it has to be a large negative one.
        own_lse, other_lse = (jnp.where(lse >= EMPTY_LSE, -EMPTY_LSE, lse) for lse in (self.lse, other.lse))
        max_lse = jnp.maximum(own_lse, other_lse)
        weights = jnp.exp(own_lse - max_lse), jnp.exp(other_lse - max_lse)
        total = weights[0] + weights[1]
        out = _move_heads_last(weights[0] / total) * self.out + _move_heads_last(weights[1] / total) * other.out
        return _PartialAttention(out, jnp.where(max_lse > -EMPTY_LSE, max_lse + jnp.log(total), EMPTY_LSE))


def _move_heads_last(values: Float[Array, "B K N"]) -> Float[Array, "B N K 1"]:
    return jnp.moveaxis(values, 1, 2)[..., None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ring_attention(ring: RingAttention, relative: RelativeBias | None, q, k, v, table, inputs: AttentionInputs):
    return _forward(ring, relative, q, k, v, table, inputs)[0]


def _forward(ring: RingAttention, relative: RelativeBias | None, q, k, v, table, inputs: AttentionInputs):
    def attend_and_merge(steps, keys, values, partial):
        pair = ring.select_tokens(relative, table, inputs, steps)

        def attend():
            part = attend_part(q, keys, values, pair, pattern=ring.pattern, chunk=ring.chunk)
            return partial.merge(_PartialAttention(*part))

        return jax.lax.cond(_has_common_segments(pair), attend, lambda: partial)

    def step(steps, carry):
        (keys, values), partial = carry
        return ring.send_to_next((keys, values)), attend_and_merge(steps, keys, values, partial)

    lse_shape = q.shape[0], q.shape[2], q.shape[1]
    initial = _PartialAttention(jnp.zeros((*q.shape[:3], v.shape[3])), jnp.full(lse_shape, EMPTY_LSE))
    # The last keys are not sent on: they would only return home.
    (keys, values), partial = jax.lax.fori_loop(0, ring.ranks - 1, step, ((k, v), initial))
    partial = attend_and_merge(ring.ranks - 1, keys, values, partial)
    out, lse = mark_checkpoint(partial, queries=q.shape[1], keys=k.shape[1])
    return out.astype(v.dtype), (q, k, v, table, inputs, out, lse)


def _backward(ring: RingAttention, relative: RelativeBias | None, saved, d_out):
    q, k, v, table, meta, out, lse = saved
    delta = jnp.moveaxis((out * d_out.astype(jnp.float32)).sum(axis=-1), 2, 1)
    zeros = jnp.zeros(q.shape), jnp.zeros(k.shape), jnp.zeros(v.shape), None if table is None else table * 0.0

    def gradients(steps, keys, values):
        pair = ring.select_tokens(relative, table, meta, steps)

        def attend():
            kinds: dict[str, Any] = {"pattern": ring.pattern, "chunk": ring.chunk}
            return compute_part_gradients(q, keys, values, pair, lse=lse, delta=delta, d_out=d_out, **kinds)

        return jax.lax.cond(_has_common_segments(pair), attend, lambda: zeros)

    def add_gradients(steps, keys_values, sums):
        (d_keys, d_values), (d_q, d_table) = sums
        more_q, *more, more_table = gradients(steps, *keys_values)
        d_keys, d_values = ring.send_to_next((d_keys + more[0], d_values + more[1]))
        return (d_keys, d_values), (d_q + more_q, None if d_table is None else d_table + more_table)

    def step(steps, carry):
        keys_values, sums = carry
        return ring.send_to_next(keys_values), add_gradients(steps, keys_values, sums)

    # A gradient of keys has to visit the same devices as its keys and then return to their owner: the loop starts with
    # the neighbour's keys, and the gradient from this device's own keys is added when the others arrive.
    d_q, *own_gradients, d_table = gradients(0, k, v)
    initial = ring.send_to_next((k, v)), (zeros[1:3], (d_q, d_table))
    keys_values, sums = jax.lax.fori_loop(1, ring.ranks - 1, step, initial)
    (d_k, d_v), (d_q, d_table) = add_gradients(ring.ranks - 1, keys_values, sums)
    d_k, d_v = d_k + own_gradients[0], d_v + own_gradients[1]
    return *(g.astype(x.dtype) for g, x in zip((d_q, d_k, d_v), (q, k, v), strict=True)), d_table, None


_ring_attention.defvjp(_forward, _backward)
