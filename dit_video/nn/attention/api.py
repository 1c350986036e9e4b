"""The one type of attention functions."""

from typing import Protocol, TypeVar, runtime_checkable

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from dit_video.nn.attention.tokens import Tokens

Queries = Float[Array, "B N K d"]
Keys = Float[Array, "B M K d"]
"""or values"""
RESULTS = "attention"
"""the name of what attention gives and its backward pass needs beside what attention is given, for `nn.Remat`"""
Named = TypeVar("Named")


def name_of(*, queries: int, keys: int) -> str | None:
    """`RESULTS`, or None for attention to fewer keys than queries, as texts have: it takes less time than what it gives
    takes memory."""
    return RESULTS if keys >= queries else None


def named(results: Named, *, queries: int, keys: int) -> Named:
    """Arrays that a backward pass is to find again by `name_of` these, where that is asked for."""
    name = name_of(queries=queries, keys=keys)
    return results if name is None else jax.tree.map(lambda x: checkpoint_name(x, name), results)


@runtime_checkable
class Attention(Protocol):
    """`softmax(q k^T / sqrt(d) + bias) v` over the keys that a query sees.

    Those are the keys of its own segment, thinned by a pattern. Padding sees nothing and is not seen. A query that sees
    nothing gets zeros.
    """

    def __call__(self, q: Queries, k: Keys, v: Keys, at: Tokens) -> Queries: ...
