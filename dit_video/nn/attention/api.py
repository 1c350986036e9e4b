"""The protocol that all attention backends implement, and the checkpoint name of their outputs."""

from typing import Protocol, TypeVar, runtime_checkable

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from dit_video.nn.attention.inputs import AttentionInputs

Queries = Float[Array, "B N K d"]
Keys = Float[Array, "B M K d"]
"""Keys, or values."""
CHECKPOINT_NAME = "attention"
"""Checkpoint name of attention's output and of the other residuals of its backward pass, for `nn.Remat`."""
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


@runtime_checkable
class Attention(Protocol):
    """A function that computes `softmax(q k^T / sqrt(d) + bias) v` over the keys that a query sees.

    Those are the keys of its own segment that the pattern allows. Padding sees nothing and is not seen. A query that
    sees nothing gets zeros.
    """

    def __call__(self, q: Queries, k: Keys, v: Keys, inputs: AttentionInputs) -> Queries: ...
