"""The one type of attention functions."""

from typing import Protocol, runtime_checkable

from jaxtyping import Array, Float, Int

from dit_video.nn.attention.indices import Coordinates


@runtime_checkable
class Attention(Protocol):
    """`softmax(q k^T / sqrt(d)) v` over the keys that a query sees: those of its own segment, thinned by a pattern.

    Segment id 0 is padding, which sees nothing and is not seen. A query that sees nothing gets zeros.

    Coordinates are (t, h, w) as `grid_indices` takes them; a pattern other than `Full` needs them. Without
    `kv_coordinates`, keys are the queries' own tokens.
    """

    def __call__(
        self,
        q: Float[Array, "B N K d"],
        k: Float[Array, "B M K d"],
        v: Float[Array, "B M K d"],
        *,
        q_segments: Int[Array, "B N"],
        kv_segments: Int[Array, "B M"],
        q_coordinates: Coordinates | None = None,
        kv_coordinates: Coordinates | None = None,
    ) -> Float[Array, "B N K d"]: ...
