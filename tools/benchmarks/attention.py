"""Attention over packed rows: the chunked backend beside dense ones over the same row, in one process, in turn.

A dense attention takes the same time whatever the row holds. One that skips foreign blocks should take the share
`sum(n_i²) / N²` of it, for clips of `n_i` tokens in a row of `N`; `times_share` is how many times that share it takes.
Times are those of `turns`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks.turns import in_turn
from dit_video.core import rng
from dit_video.nn import Attention, Tokens, make_attention

Peer = Callable[[Sequence[np.ndarray], bool], Callable[[], Any]]

HEADS, WIDTH = 2, 64
SEGMENTS = 16
MIXED = (26, 8, 13, 3, 20, 1, 10, 6, 5, 2, 4, 2)
"""of a hundredth of a row: long and short clips, and images"""


def measure(tokens: int, rounds: int, peer: Peer | None = None) -> dict[str, Any]:
    """Forward, and forward and backward, of rows of `tokens`: equal segments, a mixed histogram, and dense.

    `peer` makes a call of another project's dense attention from heads-first arrays, and whether to go backward.
    """
    draw = rng.host(0, "benchmark attention")
    q, k, v = (draw.normal(size=(1, tokens, HEADS, WIDTH)).astype(np.float32) for _ in range(3))
    equal = np.arange(tokens) * SEGMENTS // tokens + 1
    mixed = _segments(tokens)
    figures: dict[str, Any] = {"tokens": tokens, "heads": HEADS, "head width": WIDTH, "rounds": rounds}
    for what, make in (("forward", _forward), ("training", _training)):
        chunked = make_attention("chunked")
        calls = {
            f"{SEGMENTS} equal segments": _ours(make, chunked, (q, k, v), equal),
            "mixed segments": _ours(make, chunked, (q, k, v), mixed),
            "one segment": _ours(make, chunked, (q, k, v), np.ones(tokens)),
            "dense": _ours(make, make_attention("dense"), (q, k, v), np.ones(tokens)),
            "jax.nn.dot_product_attention": _ours(make, _of_jax, (q, k, v), np.ones(tokens)),
        }
        if peer is not None:
            calls["torch"] = peer([np.moveaxis(x, 2, 1) for x in (q, k, v)], what == "training")
        seconds = in_turn(calls, rounds)
        fastest = min(value for name, value in seconds.items() if "segment" not in name)
        figures[what] = {"seconds": {name: round(value, 4) for name, value in seconds.items()}} | {
            name: {"share": round(share, 4), "of_dense": round(took, 4), "times_share": round(took / share, 3)}
            for name, ids in ((f"{SEGMENTS} equal segments", equal), ("mixed segments", mixed))
            for share, took in [(_share(ids), seconds[name] / fastest)]
        }
    return figures


def _segments(tokens: int) -> np.ndarray:
    """A row of clips of mixed lengths, cut at places that are multiples of nothing."""
    ends = np.cumsum(MIXED) * tokens // sum(MIXED)
    return np.searchsorted(ends, np.arange(tokens), side="right") + 1


def _share(ids: np.ndarray) -> float:
    return float((np.bincount(ids.astype(int)).astype(float) ** 2).sum() / len(ids) ** 2)


def _ours(make: Callable[..., Any], attention: Attention, arrays: Any, ids: np.ndarray) -> Callable[[], Any]:
    call = make(attention)
    on_device = jax.device_put([*arrays, ids.astype(np.int32)[None]])
    return lambda: jax.block_until_ready(call(*on_device))


def _forward(attention: Attention) -> Callable[..., Any]:
    return jax.jit(lambda q, k, v, ids: attention(q, k, v, Tokens.among(ids)))


def _training(attention: Attention) -> Callable[..., Any]:
    def loss(q, k, v, ids):
        return attention(q, k, v, Tokens.among(ids)).sum()

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))


def _of_jax(q: jax.Array, k: jax.Array, v: jax.Array, at: Tokens) -> jax.Array:
    """Of one segment, so no mask is needed: the fastest that it can be."""
    del at
    return jax.nn.dot_product_attention(q, k, v)
