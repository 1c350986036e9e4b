"""Speed of attention over packed rows: the chunked backend against dense ones on the same row, interleaved.

Dense attention takes the same time for any content of the row. Attention that skips blocks of other segments should
take the share `sum(n_i²) / N²` of it, for clips of `n_i` tokens in a row of `N`; `times_share` is the ratio of the
measured share to this one. Times are medians from `timer`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks.timer import time_median
from dit_video.core import rng
from dit_video.nn import Attention, AttentionInputs, make_attention

PeerAttention = Callable[[Sequence[np.ndarray], bool], Callable[[], Any]]

NUM_HEADS, HEAD_WIDTH = 2, 64
NUM_SEGMENTS = 16
MIXED_LENGTHS = (26, 8, 13, 3, 20, 1, 10, 6, 5, 2, 4, 2)
"""Lengths of long and short clips and images, in percent of a row."""


def measure(tokens: int, rounds: int, peer: PeerAttention | None = None) -> dict[str, Any]:
    """Measure forward, and forward with backward, on rows of `tokens`: equal and mixed segments, and dense.

    `peer` makes a call of another project's dense attention from heads-first arrays and whether to run backward.
    """
    draw = rng.make_generator(0, "benchmark attention")
    q, k, v = (draw.normal(size=(1, tokens, NUM_HEADS, HEAD_WIDTH)).astype(np.float32) for _ in range(3))
    equal = np.arange(tokens) * NUM_SEGMENTS // tokens + 1
    mixed = _make_mixed_segments(tokens)
    figures: dict[str, Any] = {"tokens": tokens, "heads": NUM_HEADS, "head width": HEAD_WIDTH, "rounds": rounds}
    for mode, make in (("forward", _make_forward), ("training", _make_value_and_grad)):
        chunked = make_attention("chunked")
        calls = {
            f"{NUM_SEGMENTS} equal segments": _make_call(make, chunked, (q, k, v), equal),
            "mixed segments": _make_call(make, chunked, (q, k, v), mixed),
            "one segment": _make_call(make, chunked, (q, k, v), np.ones(tokens)),
            "dense": _make_call(make, make_attention("dense"), (q, k, v), np.ones(tokens)),
            "jax.nn.dot_product_attention": _make_call(make, _jax_attention, (q, k, v), np.ones(tokens)),
        }
        if peer is not None:
            calls["torch"] = peer([np.moveaxis(x, 2, 1) for x in (q, k, v)], mode == "training")
        seconds = time_median(calls, rounds)
        fastest = min(value for name, value in seconds.items() if "segment" not in name)
        figures[mode] = {"seconds": {name: round(value, 4) for name, value in seconds.items()}} | {
            name: {"share": round(share, 4), "of_dense": round(ratio, 4), "times_share": round(ratio / share, 3)}
            for name, ids in ((f"{NUM_SEGMENTS} equal segments", equal), ("mixed segments", mixed))
            for share, ratio in [(_compute_share(ids), seconds[name] / fastest)]
        }
    return figures


def _make_mixed_segments(tokens: int) -> np.ndarray:
    """Return the segment ids of a row of clips of mixed lengths, whose bounds are not aligned to blocks."""
    ends = np.cumsum(MIXED_LENGTHS) * tokens // sum(MIXED_LENGTHS)
    return np.searchsorted(ends, np.arange(tokens), side="right") + 1


def _compute_share(ids: np.ndarray) -> float:
    return float((np.bincount(ids.astype(int)).astype(float) ** 2).sum() / len(ids) ** 2)


def _make_call(make_fn: Callable[..., Any], attention: Attention, arrays: Any, ids: np.ndarray) -> Callable[[], Any]:
    call = make_fn(attention)
    on_device = jax.device_put([*arrays, ids.astype(np.int32)[None]])
    return lambda: jax.block_until_ready(call(*on_device))


def _make_forward(attention: Attention) -> Callable[..., Any]:
    return jax.jit(lambda q, k, v, ids: attention(q, k, v, AttentionInputs.self_attention(ids)))


def _make_value_and_grad(attention: Attention) -> Callable[..., Any]:
    def loss(q, k, v, ids):
        return attention(q, k, v, AttentionInputs.self_attention(ids)).sum()

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))


def _jax_attention(q: jax.Array, k: jax.Array, v: jax.Array, inputs: AttentionInputs) -> jax.Array:
    """Call JAX's attention without a mask, at its fastest, which is exact for a row of one segment."""
    del inputs
    return jax.nn.dot_product_attention(q, k, v)
