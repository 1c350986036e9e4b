"""From clips to the latents that a denoiser is trained on: which stretches are taken, and the autoencoder over them."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float32, UInt8

from dit_video import pixels
from dit_video.data.latents import LatentExample
from dit_video.data.sizes import SizeLimits, fit, read_fitted, sampled_frames
from dit_video.data.source import ClipSource
from dit_video.tokens import Grid

_BATCH = 16
"""Clips that are encoded together."""


def stretches(clips: ClipSource, limits: SizeLimits, *, most: int) -> list[list[int]]:
    """The first frame of every stretch that is taken of each clip: up to `most`, spread over its length."""
    starts = []
    for info in clips.infos:
        spare = sampled_frames(info, limits) - fit(info, limits).t
        count = min(most, spare + 1)
        starts.append(sorted({round(spare * index / max(1, count - 1)) for index in range(count)}))
    return starts


def encode_clips(
    autoencoder: nnx.GraphDef,
    params: dict[str, Any],
    clips: ClipSource,
    limits: SizeLimits,
    starts: Sequence[Sequence[int]],
) -> Iterator[LatentExample]:
    """Latents of every clip's stretches, those of one size together: a size compiles once."""

    @jax.jit
    def encode(params, batch):
        return nnx.merge(autoencoder, params).encode(pixels.to_float(batch))

    by_size: dict[Grid, list[tuple[int, int]]] = {}
    for index, of_clip in enumerate(starts):
        by_size.setdefault(fit(clips.infos[index], limits), []).extend((index, start) for start in of_clip)
    for members in by_size.values():
        for first in range(0, len(members), _BATCH):
            part = members[first : first + _BATCH]
            frames = [read_fitted(clips, index, limits, start=start).frames for index, start in part]
            full = np.stack(frames + [frames[-1]] * (_BATCH - len(frames)))
            for (index, start), latents in zip(part, np.asarray(encode(params, full)), strict=False):
                info = clips.infos[index]
                yield LatentExample(f"{info.name}@{start}", info.caption, latents)


def latent_moments(
    autoencoder: nnx.GraphDef, params: dict[str, Any], batches: Iterable[UInt8[np.ndarray, "B T H W 3"]]
) -> tuple[Float32[np.ndarray, " c"], Float32[np.ndarray, " c"]]:
    """Mean and standard deviation of each latent channel, before normalisation, over batches of clips."""

    @jax.jit
    def means(params, batch):
        return nnx.merge(autoencoder, params).posterior(pixels.to_float(batch)).mean

    total, squares, count = np.float64(0), np.float64(0), 0
    for batch in batches:
        latents = np.asarray(means(params, batch), np.float64)
        axes = tuple(range(latents.ndim - 1))
        total, squares = total + latents.sum(axes), squares + np.square(latents).sum(axes)
        count += latents[..., 0].size
    mean = total / count
    # A channel that says nothing has no variance, up to rounding that can make it negative.
    std = np.sqrt(np.maximum(squares / count - mean**2, 1e-12))
    return np.asarray(mean, np.float32), np.asarray(std, np.float32)
