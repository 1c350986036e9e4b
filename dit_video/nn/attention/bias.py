"""A learned bias of attention's scores, by how far a key lies from its query along (t, h, w)."""

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
    """The sum of one learned value for each axis, of every head, found by the difference of two tokens' coordinates.

    Differences are counted in steps and fall into buckets, half of an axis' buckets for each direction. The first half
    of those hold one step each, the others grow by a constant factor up to `distance`, beyond which all are one (T5,
    arXiv 1910.10683, section 2.1). With a distance of None every bucket holds one step, as in a Swin window
    (arXiv 2103.14030, section 3.2), and the last one all beyond.

    Raises:
      UserError: an odd number of buckets or fewer than 4, a distance that the buckets of one step reach already, or a
        scale that isn't positive.
    """

    buckets: tuple[int, int, int] = (32, 32, 32)
    distance: tuple[int | None, int | None, int | None] = (128, 128, 128)
    scale: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """steps in one unit of the coordinates: of frames and patches 1, of seconds as many as shall be told apart"""

    def __post_init__(self):
        if any(count < 4 or count % 2 for count in self.buckets):
            raise UserError(f"a relative bias has an even number of buckets along each axis, 4 or more: {self.buckets}")
        for count, distance in zip(self.buckets, self.distance, strict=True):
            if distance is not None and distance <= count // 4:
                raise UserError(
                    f"{count} buckets of a relative bias tell {count // 4} steps apart already, more than the distance "
                    f"of {distance}; raise the distance, or use None"
                )
        if min(self.scale) <= 0:
            raise UserError(f"the scale {self.scale} of a relative bias must be positive")

    @property
    def entries(self) -> int:
        """Values in a head's table (T): the axes' buckets one after the other."""
        return sum(self.buckets)

    def find(self, q: Float[Array, "*B N 3"], kv: Float[Array, "*B M 3"]) -> list[Int[Array, "*B N M"]]:
        """For each axis the table's entry of every pair; beyond the table where one of the two has no finite place."""
        known = jnp.isfinite(q).all(axis=-1)[..., :, None] & jnp.isfinite(kv).all(axis=-1)[..., None, :]
        q, kv = jnp.where(jnp.isfinite(q), q, 0), jnp.where(jnp.isfinite(kv), kv, 0)
        starts = itertools.accumulate(self.buckets[:-1], initial=0)
        return [
            jnp.where(known, start + self._bucket(kv[..., None, :, axis] - q[..., :, None, axis], axis), self.entries)
            for axis, start in enumerate(starts)
        ]

    def _bucket(self, difference: Float[Array, "*B N M"], axis: int) -> Int[Array, "*B N M"]:
        near = self._near(axis)
        steps = jnp.round(difference * self.scale[axis])
        far = jnp.minimum(jnp.abs(steps), len(near) - 1).astype(jnp.int32)
        return jnp.asarray(near)[far] + self.buckets[axis] // 2 * (steps > 0)

    def _near(self, axis: int) -> Int32[np.ndarray, " n"]:
        """The buckets of 0, 1, 2, … steps in one direction; the last is that of all beyond."""
        half, distance = self.buckets[axis] // 2, self.distance[axis]
        if distance is None:
            return np.arange(half, dtype=np.int32)
        steps, exact = np.arange(distance + 1), half // 2
        ratio = np.log(np.maximum(steps, exact) / exact) / math.log(distance / exact)
        far = np.minimum(exact + (ratio.astype(np.float32) * (half - exact)).astype(np.int32), half - 1)
        return np.where(steps < exact, steps, far).astype(np.int32)

    def read(self, table: Float[Array, " T"], found: list[Int[Array, "*B N M"]]) -> Float[Array, "*B N M"]:
        """What is added to one head's scores; nothing where `found` is beyond the table."""
        parts = [table.at[entries].get(mode="fill", fill_value=0) for entries in found]
        return parts[0] + parts[1] + parts[2]

    def gradient(self, scores: Float[Array, "N M"], found: list[Int[Array, "N M"]]) -> Float[Array, " T"]:
        """Of a head's table, from the gradients of its scores.

        Sums instead of the transpose of `read`, a scatter of N × M values to a few places.
        """
        starts = list(itertools.accumulate(self.buckets, initial=0))
        sums = [
            jax.vmap(lambda entry, entries=entries: jnp.where(entries == entry, scores, 0).sum())(jnp.arange(*ends))
            for entries, ends in zip(found, itertools.pairwise(starts), strict=True)
        ]
        return jnp.concatenate(sums)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Bias:
    """A relative bias with what it takes to compute it, for any block of queries and keys."""

    relative: RelativeBias = field(metadata={"static": True})
    table: Float[Array, "T K"]
    q_coordinates: Float[Array, "B N 3"]
    """not finite where a token has no place: it gets no bias, and gives none"""
    kv_coordinates: Float[Array, "B M 3"]


class BiasTable(nnx.Module):
    """The learned values of a relative bias."""

    def __init__(self, relative: RelativeBias, heads: int, *, rngs: nnx.Rngs):
        self.relative = relative
        normal = nnx.initializers.normal(0.02)
        self.table = nnx.Param(normal(rngs.params(), (relative.entries, heads), jnp.float32))

    def __call__(self, coordinates: Float[Array, "B N 3"]) -> Bias:
        """Of self-attention among these tokens."""
        return Bias(
            relative=self.relative, table=self.table[...], q_coordinates=coordinates, kv_coordinates=coordinates
        )
