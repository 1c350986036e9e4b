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


def named(results: Named) -> Named:
    """Arrays that a backward pass is to find again by the name `RESULTS`, where that is asked for."""
    return jax.tree.map(lambda x: checkpoint_name(x, RESULTS), results)


@runtime_checkable
class Attention(Protocol):
    """`softmax(q k^T / sqrt(d) + bias) v` over the keys that a query sees.

    Those are the keys of its own segment, thinned by a pattern. Padding sees nothing and is not seen. A query that sees
    nothing gets zeros.
    """

    def __call__(self, q: Queries, k: Keys, v: Keys, at: Tokens) -> Queries: ...
