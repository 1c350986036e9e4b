"""Learned relative position bias of attention's scores along (t, h, w)."""

import itertools
import math
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Int32

from dit_video.core.errors import UserError


@dataclass(frozen=True, kw_only=True)
class RelativeBias:
    """Configuration of a relative position bias: per head, the sum over the axes of one learned value each.

    The value of an axis is chosen by the bucket of the difference of two tokens' positions, counted in steps; half of
    an axis' buckets are for each direction. The first half of those hold one step each, the others grow by a constant
    factor up to `max_distance`, and the last one holds all larger differences (T5, arXiv 1910.10683, section 2.1). With
    `max_distance` None every bucket holds one step, as in a Swin window (arXiv 2103.14030, section 3.2), and the last
    one all larger differences.

    Raises:
      UserError: an odd number of buckets or fewer than 4, a `max_distance` that the buckets of one step cover already,
        or a scale that is not positive.
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
        """Return each pair's table entry for every axis; it is beyond the table if a coordinate is not finite."""
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
        """Return the buckets of 0, 1, 2, … steps in one direction; the last entry is for all larger distances."""
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

        It is computed by sums: the transpose of `read` would scatter N × M values to a few entries, which is slow.
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
