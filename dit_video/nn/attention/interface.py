"""The one type of attention functions."""

from typing import Protocol, runtime_checkable

from jaxtyping import Array, Float

from dit_video.nn.attention.tokens import Tokens

Queries = Float[Array, "B N K d"]
Keys = Float[Array, "B M K d"]
"""or values"""


@runtime_checkable
class Attention(Protocol):
    """`softmax(q k^T / sqrt(d) + bias) v` over the keys that a query sees.

    Those are the keys of its own segment, thinned by a pattern. Padding sees nothing and is not seen. A query that sees
    nothing gets zeros.
    """

    def __call__(self, q: Queries, k: Keys, v: Keys, at: Tokens) -> Queries: ...
