"""The interface of attention backends: queries, keys, values, segments and biases in, outputs out."""

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar, cast, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, Int32

from dit_video.core.errors import UserError
from dit_video.tokens.segments import take_tokens


@dataclass(frozen=True, kw_only=True)
class RelativeBias:
    """Configuration of a relative position bias: in each head, the sum of one learned value per axis.

    The difference of two tokens' positions, counted in steps, falls into a bucket that selects the axis's value. Half
    of an axis's buckets serve each direction. The first half of these hold one step each, the others grow by a constant
    factor up to `max_distance`, and the last one holds all larger differences (T5, arXiv 1910.10683, section 2.1). If
    `max_distance` is None, every bucket holds one step, as in a Swin window (arXiv 2103.14030, section 3.2), and the
    last one holds all larger differences.

    Raises:
      UserError: If the number of buckets is odd or below 4, the buckets of one step already cover `max_distance`, or a
        scale is not positive.
    """

    buckets: tuple[int, int, int] = (32, 32, 32)
    max_distance: tuple[int | None, int | None, int | None] = (128, 128, 128)
    scale: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Steps per unit of the positions: 1 for frames and patches, the resolution in steps per second for seconds."""

    def __post_init__(self):
        if any(count < 4 or count % 2 for count in self.buckets):
            raise UserError(f"relative bias buckets {self.buckets} are invalid; use even numbers of at least 4")
        for count, distance in zip(self.buckets, self.max_distance, strict=True):
            if distance is not None and distance <= count // 4:
                raise UserError(f"max_distance={distance} is invalid: {count} buckets cover it. Use more, or None")
        if min(self.scale) <= 0:
            raise UserError(f"relative bias scale {self.scale} is invalid; use positive numbers")

    @property
    def num_entries(self) -> int:
        """Return the number of values in a head's table (T): the buckets of all axes, concatenated."""
        return sum(self.buckets)

    def find_entries(self, q: Float[Array, "*B N 3"], kv: Float[Array, "*B M 3"]) -> list[Int[Array, "*B N M"]]:
        """Return each pair's table entry for every axis; it lies beyond the table if a coordinate is not finite."""
        finite = jnp.isfinite(q).all(axis=-1)[..., :, None] & jnp.isfinite(kv).all(axis=-1)[..., None, :]
        q, kv = jnp.where(jnp.isfinite(q), q, 0), jnp.where(jnp.isfinite(kv), kv, 0)
        starts = itertools.accumulate(self.buckets[:-1], initial=0)
        entries = []
        for axis, start in enumerate(starts):
            buckets, difference = self._list_buckets(axis), kv[..., None, :, axis] - q[..., :, None, axis]
            steps = jnp.round(difference * self.scale[axis])
            distance = jnp.minimum(jnp.abs(steps), len(buckets) - 1).astype(jnp.int32)
            bucket = jnp.asarray(buckets)[distance] + self.buckets[axis] // 2 * (steps > 0)
            entries.append(jnp.where(finite, start + bucket, self.num_entries))
        return entries

    def _list_buckets(self, axis: int) -> Int32[np.ndarray, " n"]:
        """Return the buckets of 0, 1, 2, … steps in one direction; the last entry serves all larger distances."""
        half, distance = self.buckets[axis] // 2, self.max_distance[axis]
        if distance is None:
            return np.arange(half, dtype=np.int32)
        steps, exact = np.arange(distance + 1), half // 2
        ratio = np.log(np.maximum(steps, exact) / exact) / math.log(distance / exact)
        far = np.minimum(exact + (ratio.astype(np.float32) * (half - exact)).astype(np.int32), half - 1)
        return np.where(steps < exact, steps, far).astype(np.int32)

    def read_bias(self, table: Float[Array, " T"], entries: list[Int[Array, "*B N M"]]) -> Float[Array, "*B N M"]:
        """Return the bias of one head's scores; zero where an entry is beyond the table."""
        parts = [table.at[axis_entries].get(mode="fill", fill_value=0) for axis_entries in entries]
        return parts[0] + parts[1] + parts[2]

    def compute_table_gradient(
        self, scores: Float[Array, "N M"], entries: list[Int[Array, "N M"]]
    ) -> Float[Array, " T"]:
        """Return the gradient of a head's table from the gradients of its scores.

        It is computed by sums, because the transpose of `read` would scatter N × M values to a few entries, which is
        slow.
        """
        starts = list(itertools.accumulate(self.buckets, initial=0))
        sums = [
            jax.vmap(lambda entry, pairs=pairs: jnp.where(pairs == entry, scores, 0).sum())(jnp.arange(*ends))
            for pairs, ends in zip(entries, itertools.pairwise(starts), strict=True)
        ]
        return jnp.concatenate(sums)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Bias:
    """A relative bias with its learned table and the tokens' positions, for any block of queries and keys."""

    config: RelativeBias = field(metadata={"static": True})
    table: Float[Array, "T K"]
    q_positions: Float[Array, "B N 3"]
    """Coordinates of the queries; infinite for tokens without a position, whose scores get no bias."""
    kv_positions: Float[Array, "B M 3"]


class BiasTable(nnx.Module):
    """The learned table of a relative bias."""

    def __init__(self, config: RelativeBias, heads: int, *, rngs: nnx.Rngs):
        self.config = config
        normal = nnx.initializers.normal(0.02)
        self.table = nnx.Param(normal(rngs.params(), (config.num_entries, heads), jnp.float32))

    def __call__(self, positions: Float[Array, "B N 3"]) -> Bias:
        """Return the bias for self-attention among tokens with these positions."""
        return Bias(config=self.config, table=self.table[...], q_positions=positions, kv_positions=positions)


Coordinates = Float[Array, "B N 3"] | Int[Array, "B N 3"]
"""Coordinates (t, h, w) of tokens, in any unit."""

GLOBAL = -1
"""Grid index, along all axes, of tokens without a position in a clip: registers, and text in joint attention."""


@jax.tree_util.register_static
@dataclass(frozen=True)
class ContiguousSegments:
    """Order of rows in which each segment's tokens are adjacent; a row's only segment begins the row.

    Kernels that take the lengths of segments instead of ids need it. It is part of a pytree's structure.
    """

    count: int
    """Largest segment id of a row."""


class AttentionInputs(NamedTuple):
    """The metadata of attention's queries and keys.

    Segment id 0 is padding. Grid indices come from `compute_grid_indices`, with queries and keys on one grid; only
    patterns other than `Full` read them. In self-attention the keys are the same tokens as the queries and their fields
    are None, which tells a backend that every token with a segment sees at least itself. Keys that are not queries,
    such as a text's or a cache's, have fields of their own.
    """

    q_segments: Int[Array, "B N"]
    context_segments: Int[Array, "B M"] | None = None
    """Segment ids of the keys; None in self-attention."""
    q_indices: Int[Array, "B N 3"] | None = None
    context_indices: Int[Array, "B M 3"] | None = None
    bias: Bias | None = None
    """Bias that is added to the scores, for backends that support it."""
    contiguous: ContiguousSegments | None = None
    """Marks that queries and keys are in this order; None in any other order."""

    @classmethod
    def self_attention(
        cls,
        segments: Int[Array, "B N"],
        indices: Int[Array, "B N 3"] | None = None,
        *,
        bias: Bias | None = None,
        segment_count: int | None = None,
    ) -> "AttentionInputs":
        """Return the inputs of self-attention, whose queries and keys are the same tokens.

        Args:
          segments: Segment ids.
          indices: Grid indices, for patterns other than `Full`.
          bias: Bias of the scores.
          segment_count: Largest segment id of a row whose segments are contiguous; None in any other order.
        """
        contiguous = None if segment_count is None else ContiguousSegments(segment_count)
        return cls(segments, q_indices=indices, bias=bias, contiguous=contiguous)

    def with_context(self, segments: Int[Array, "B M"]) -> "AttentionInputs":
        """Return the inputs of these queries' attention to a context; if their segments are contiguous, so are its."""
        return AttentionInputs(self.q_segments, segments, contiguous=self.contiguous)

    def take(self, kept: Int[Array, "B Q"]) -> "AttentionInputs":
        """Return the inputs of self-attention among some of the tokens, by their numbers in increasing order."""
        indices = None if self.q_indices is None else take_tokens(self.q_indices, kept)
        return self._replace(q_segments=take_tokens(self.q_segments, kept), q_indices=indices)

    @property
    def segment_count(self) -> int | None:
        """Return the largest segment id of contiguous segments; None in any other order."""
        return None if self.contiguous is None else self.contiguous.count

    @property
    def kv_segments(self) -> Int[Array, "B M"]:
        return self.q_segments if self.context_segments is None else self.context_segments

    @property
    def kv_indices(self) -> Int[Array, "B M 3"] | None:
        return self.q_indices if self.context_segments is None else self.context_indices

    def require_no_bias(self, backend: str) -> "AttentionInputs":
        """Return these inputs unchanged.

        Raises:
          UserError: If there is a bias, which this backend does not support.
        """
        if self.bias is not None:
            raise UserError(f"{backend} attention cannot add a bias to its scores; use the backend chunked or dense")
        return self


def compute_grid_indices(positions: Coordinates, segments: Int[Array, "B N"]) -> Int[Array, "B N 3"]:
    """Return the index of every token along t, h and w, from 0 in each segment.

    Integer positions are returned as they are. Real ones (seconds, fractions of the frame size) become ranks: the
    number of distinct smaller positions along that axis in the token's segment. Neighbouring frames therefore differ by
    1, however far apart they are in time.
    """
    if jnp.issubdtype(positions.dtype, jnp.integer):
        return positions
    ranks = jax.vmap(jax.vmap(_compute_ranks, in_axes=(-1, None), out_axes=-1))
    return ranks(positions, segments)


def _compute_ranks(values: Float[Array, " N"], ids: Int[Array, " N"]) -> Int[Array, " N"]:
    order = jnp.lexsort((values, ids))
    values, ids = values[order], ids[order]
    begins = jnp.pad(ids[1:] != ids[:-1], (1, 0), constant_values=True)
    steps = begins | jnp.pad(values[1:] != values[:-1], (1, 0))
    count = jnp.cumsum(steps, dtype=jnp.int32)
    ranks = count - jax.lax.cummax(jnp.where(begins, count, 0))
    return jnp.zeros_like(ranks).at[order].set(ranks)


Queries = Float[Array, "B N K d"]
Keys = Float[Array, "B M K d"]
"""Keys, or values."""
CHECKPOINT_NAME = "attention"
"""Checkpoint name of attention's output and the other residuals of its backward pass, for `nn.Remat`."""
Arrays = TypeVar("Arrays")


def get_checkpoint_name(*, queries: int, keys: int) -> str | None:
    """Return the checkpoint name of the output; None for attention to fewer keys than queries.

    Such cross-attention to short text is cheaper to recompute than to keep.
    """
    return CHECKPOINT_NAME if keys >= queries else None


def mark_checkpoint(results: Arrays, *, queries: int, keys: int) -> Arrays:
    """Mark arrays with the checkpoint name, so that a remat policy can keep them for the backward pass."""
    name = get_checkpoint_name(queries=queries, keys=keys)
    return results if name is None else jax.tree.map(lambda x: checkpoint_name(x, name), results)


_Call = TypeVar("_Call", bound=Callable[..., Queries])


def name_calls(backend: str) -> Callable[[_Call], _Call]:
    """Return a decorator of a backend's `__call__`, after which compiled programs tell where it is used.

    Its operations are in the scope `attention:BACKEND:PATTERN:KIND`, with kind `self` or `cross`; see
    `core.hlo.read_program`.
    """

    def decorate(call: _Call) -> _Call:
        @functools.wraps(call)
        def named_call(self: Any, q: Queries, k: Keys, v: Keys, inputs: AttentionInputs) -> Queries:
            kind = "self" if inputs.context_segments is None else "cross"
            with jax.named_scope(f"attention:{backend}:{type(self.pattern).__name__}:{kind}"):
                return call(self, q, k, v, inputs)

        return cast(_Call, named_call)

    return decorate


@runtime_checkable
class Attention(Protocol):
    """A function that computes `softmax(q k^T / sqrt(d) + bias) v` over the keys that a query sees.

    Those are the keys of its own segment that the pattern allows. Padding sees nothing and is not seen. A query that
    sees nothing gets zeros.
    """

    def __call__(self, q: Queries, k: Keys, v: Keys, inputs: AttentionInputs) -> Queries: ...
