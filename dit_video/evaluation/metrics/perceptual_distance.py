"""LPIPS of reconstructions, the perceptual distance of arXiv 1801.03924."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float32, UInt8

from dit_video.core.pixels import to_float
from dit_video.evaluation.feature_functions.feature_function import make_identity
from dit_video.evaluation.metrics.metric import MeanMetric, MetricBatch, MetricDescription
from dit_video.evaluation.metrics.ssim_terms import check_same_shape
from dit_video.models.features import Lpips
from dit_video.nn import get_graph_def
from dit_video.weights import load_lpips

CHUNK_PIXELS = 4 * 256 * 256
"""Pixels of the frames that are compared at once."""


class _LpipsWeights(NamedTuple):
    params: dict[str, Any]
    identity: str
    """Name of the network, and hash of its weights."""


@functools.lru_cache(maxsize=1)
def _load_weights(path: str) -> _LpipsWeights:
    return _LpipsWeights(jax.device_put(load_lpips(path)), make_identity("LPIPS", path))


def _make_lpips(rngs: nnx.Rngs) -> Lpips:
    return Lpips(rngs=rngs)


@jax.jit
def _compare_chunk(
    params: dict[str, Any], frames: UInt8[Array, "n H W 3"], others: UInt8[Array, "n H W 3"]
) -> Float32[Array, " n"]:
    return nnx.merge(get_graph_def(_make_lpips), params)(to_float(frames)[:, None], to_float(others)[:, None])


def compute_perceptual_distance(
    original: UInt8[np.ndarray, "T H W 3"],
    other: UInt8[np.ndarray, "..."],
    *,
    weights: str,
    chunk_pixels: int = CHUNK_PIXELS,
) -> float:
    """Return the LPIPS of two clips, averaged over frames; 0 if they are equal.

    Frames are compared in chunks, so that memory does not grow with the clip.

    Args:
      original: frames of a clip, of at least 16×16 pixels.
      other: frames of the other.
      weights: file of the weights (see `load_lpips`), which is read once.
      chunk_pixels: pixels of the frames that are compared at once; a frame at least.

    Raises:
      MissingError: the file does not exist.
      UserError: it is of another network, the shapes differ, or the frames are too small.
    """
    check_same_shape(original, other)
    frames, height, width = original.shape[:3]
    # Chunks of equal lengths, the last one filled up with repeated frames: one program for all of a clip.
    chunks = -(-frames // max(1, chunk_pixels // (height * width)))
    size = -(-frames // chunks)
    params, distances = _load_weights(weights).params, []
    for start in range(0, frames, size):
        indices = np.minimum(np.arange(start, start + size), frames - 1)
        chunk = _compare_chunk(params, jnp.asarray(original[indices]), jnp.asarray(other[indices]))
        distances.append(np.asarray(chunk))
    return float(np.concatenate(distances)[:frames].mean(axis=0))


@dataclass(frozen=True, kw_only=True)
class PerceptualDistance(MeanMetric):
    """Mean LPIPS of the autoencoder's reconstructions, with features of VGG16."""

    weights: str
    """File of the weights of the package `lpips`; `dit_video.weights.load_lpips` says how to make it."""

    needs, name = ("pairs",), "perceptual_distance"
    description = MetricDescription(
        label="LPIPS",
        is_higher_better=False,
        explanation="of held-out clips, with VGG16 (arXiv 1801.03924); 0 for equal clips",
    )

    def open_weights(self) -> tuple[str, ...]:
        """Read the weights, and return their identity."""
        return (_load_weights(self.weights).identity,)

    def measure(self, batch: MetricBatch) -> Sequence[float]:
        """Return the distance of every reconstruction."""
        pairs = [(pair.original.frames, pair.decoded.frames) for pair in batch.pairs]
        return [compute_perceptual_distance(*pair, weights=self.weights) for pair in pairs]

    def make_note(self, state: tuple[float | None, ...]) -> str:
        """Return the hash of the weights; empty without examples."""
        return _load_weights(self.weights).identity if state else ""
