"""Ring attention: keys and values go round the devices that share a row (arXiv 2310.01889).

Every device keeps its own queries. In each of `ranks` steps it attends to the keys that it holds at that time, which it
adds to what it has by an online softmax, while they are on their way to the next device. Keys of foreign segments are
passed on without a product. The backward pass goes round once more, with the gradients of keys and values in float32
beside them; one hop is saved by starting at the neighbour: its own keys each device does without communication. So a
device sends `(ranks - 1) (2 b + 2 (b + 4))` bytes a value of its keys, `b` being those of the model's dtype.

Called under `jax.shard_map`, on the tokens of one rank.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from dit_video.nn.attention import Bias, Full, Pattern, RelativeBias, Tokens
from dit_video.nn.attention.api import Keys, Queries, named
from dit_video.nn.attention.backends.chunked import NOTHING, attend_part, part_gradients

_MOST = int(np.iinfo(np.int32).max)


@dataclass(frozen=True)
class Ring:
    """Attention among the tokens of a row that lie on `ranks` devices along the mesh axis `axis`.

    Blocks of `chunk` queries by `chunk` keys are computed as by the backend `chunked`, whatever the pattern.
    """

    axis: str
    ranks: int
    pattern: Pattern = Full()
    chunk: int = 256

    def __call__(self, q: Queries, k: Keys, v: Keys, at: Tokens) -> Queries:
        """`q`, `k` and `v` of this rank's tokens, `at` of the whole row's."""
        if at.bias is None:
            return _ring(self, None, q, k, v, None, at)
        return _ring(self, at.bias.relative, q, k, v, at.bias.table, at._replace(bias=_untabled(at.bias)))

    def hop(self, arrays: PyTree) -> PyTree:
        """To the next rank."""
        pairs = [(rank, (rank + 1) % self.ranks) for rank in range(self.ranks)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axis, pairs), arrays)

    def met(
        self, relative: RelativeBias | None, table: Array | None, at: Tokens, steps: Int[Array, ""] | int
    ) -> "_Met":
        """The queries of this rank, and the keys that came from so many steps behind."""
        rank, size = jax.lax.axis_index(self.axis), at.q_segments.shape[1] // self.ranks
        source = (rank - steps) % self.ranks

        def part(rows, of):
            return None if rows is None else jax.lax.dynamic_slice_in_dim(rows, of * size, size, axis=1)

        bias = None
        if at.bias is not None:
            assert relative is not None
            assert table is not None
            places = part(at.bias.q_coordinates, rank), part(at.bias.kv_coordinates, source)
            bias = Bias(relative=relative, table=table, q_coordinates=places[0], kv_coordinates=places[1])
        return _Met(
            Tokens(
                part(at.q_segments, rank),
                part(at.kv_segments, source),
                part(at.q_indices, rank),
                part(at.kv_indices, source),
                bias,
            )
        )


class _Met(NamedTuple):
    """The tokens of two ranks."""

    at: Tokens

    def related(self) -> Bool[Array, ""]:
        """Whether any row has segments in both, going by the range of their numbers."""
        least, most = _range(self.at.q_segments)
        key_least, key_most = _range(self.at.kv_segments)
        return ((least <= key_most) & (key_least <= most)).any()


def _range(segments: Int[Array, "B N"]) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
    """The least and the most of each row's segments; an empty range of padding alone."""
    return jnp.where(segments > 0, segments, _MOST).min(axis=1), segments.max(axis=1)


def _untabled(bias: Bias) -> Bias:
    """Without its values, which a gradient reaches by another way."""
    return Bias(
        relative=bias.relative,
        table=jnp.zeros((0, 0)),
        q_coordinates=bias.q_coordinates,
        kv_coordinates=bias.kv_coordinates,
    )


class _Mixed(NamedTuple):
    """What queries have mixed so far, and the logarithms of their sums of exponentials; float32."""

    out: Queries
    lse: Float[Array, "B K N"]

    def and_(self, other: "_Mixed") -> "_Mixed":
        """Of both parts' keys."""
        ours, theirs = (jnp.where(lse >= NOTHING, -NOTHING, lse) for lse in (self.lse, other.lse))
        top = jnp.maximum(ours, theirs)
        shares = jnp.exp(ours - top), jnp.exp(theirs - top)
        total = shares[0] + shares[1]
        out = _of_heads(shares[0] / total) * self.out + _of_heads(shares[1] / total) * other.out
        return _Mixed(out, jnp.where(top > -NOTHING, top + jnp.log(total), NOTHING))


def _of_heads(values: Float[Array, "B K N"]) -> Float[Array, "B N K 1"]:
    return jnp.moveaxis(values, 1, 2)[..., None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ring(how: Ring, relative: RelativeBias | None, q, k, v, table, at: Tokens):
    return _forward(how, relative, q, k, v, table, at)[0]


def _forward(how: Ring, relative: RelativeBias | None, q, k, v, table, at: Tokens):
    def take(steps, keys, values, mixed):
        met = how.met(relative, table, at, steps)

        def attend():
            return mixed.and_(_Mixed(*attend_part(q, keys, values, met.at, pattern=how.pattern, chunk=how.chunk)))

        return jax.lax.cond(met.related(), attend, lambda: mixed)

    def step(steps, carried):
        (keys, values), mixed = carried
        return how.hop((keys, values)), take(steps, keys, values, mixed)

    heads = q.shape[0], q.shape[2], q.shape[1]
    begin = _Mixed(jnp.zeros((*q.shape[:3], v.shape[3])), jnp.full(heads, NOTHING))
    (keys, values), mixed = jax.lax.fori_loop(0, how.ranks - 1, step, ((k, v), begin))
    out, lse = named(take(how.ranks - 1, keys, values, mixed), queries=q.shape[1], keys=k.shape[1])
    return out.astype(v.dtype), (q, k, v, table, at, out, lse)


def _backward(how: Ring, relative: RelativeBias | None, saved, d_out):
    q, k, v, table, at, out, lse = saved
    delta = jnp.moveaxis((out * d_out.astype(jnp.float32)).sum(axis=-1), 2, 1)
    nothing = jnp.zeros(q.shape), jnp.zeros(k.shape), jnp.zeros(v.shape), None if table is None else table * 0.0

    def gradients(steps, keys, values):
        met = how.met(relative, table, at, steps)

        def attend():
            found = {"lse": lse, "delta": delta, "d_out": d_out}
            return part_gradients(q, keys, values, met.at, pattern=how.pattern, chunk=how.chunk, **found)

        return jax.lax.cond(met.related(), attend, lambda: nothing)

    def take(steps, held, gathered):
        (d_keys, d_values), (d_q, d_table) = gathered
        more_q, *more, more_table = gradients(steps, *held)
        d_keys, d_values = how.hop((d_keys + more[0], d_values + more[1]))
        return (d_keys, d_values), (d_q + more_q, _sum(d_table, more_table))

    def step(steps, carried):
        held, gathered = carried
        return how.hop(held), take(steps, held, gathered)

    d_q, *home, d_table = gradients(0, k, v)
    begin = how.hop((k, v)), (nothing[1:3], (d_q, d_table))
    held, gathered = jax.lax.fori_loop(1, how.ranks - 1, step, begin)
    (d_k, d_v), (d_q, d_table) = take(how.ranks - 1, held, gathered)
    d_k, d_v = d_k + home[0], d_v + home[1]
    return *(g.astype(x.dtype) for g, x in zip((d_q, d_k, d_v), (q, k, v), strict=True)), d_table, None


_ring.defvjp(_forward, _backward)


def _sum(one: Array | None, other: Array | None) -> Array | None:
    return None if one is None or other is None else one + other
