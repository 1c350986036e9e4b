"""Clips that are encoded as they are read, for training without a cache of latents."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float32, UInt8

from dit_video.autoencoder import AutoencoderConfig, covers, latent_grid
from dit_video.encoding import encode_canvases
from dit_video.errors import UserError
from dit_video.nn import graph_of
from dit_video.tokens import Grid

_TOGETHER = 4
"""Canvases of one call: always as many, so that a size compiles once."""


class LiveEncoder:
    """Latents of clips of any sizes, by at most eight programs.

    A clip lies in the corner of the smallest canvas that holds it; the rest of the canvas is masked, so that its
    latents are those that it has alone.

    Args:
      autoencoder: its config.
      params: its parameters.
      sizes: of all clips that will come, in frames and pixels.
    """

    def __init__(self, autoencoder: AutoencoderConfig, params: dict[str, Any], sizes: Sequence[Grid]):
        self.canvases = covers(sizes)
        """The sizes of the canvases, by increasing volume."""
        self._stride, self._graph = autoencoder.stride, graph_of(autoencoder.make)
        self._params = jax.device_put(params)

    def __call__(self, clips: Sequence[UInt8[np.ndarray, "_ _ _ 3"]]) -> list[Float32[np.ndarray, "_ _ _ c"]]:
        """Latents of the clips, in their order.

        Raises:
          UserError: a clip that is larger than all that were announced.
        """
        by_canvas: dict[Grid, list[int]] = {}
        for number, clip in enumerate(clips):
            by_canvas.setdefault(self._canvas(Grid(*clip.shape[:3])), []).append(number)
        results: dict[int, np.ndarray] = {}
        for canvas, members in by_canvas.items():
            for first in range(0, len(members), _TOGETHER):
                part = members[first : first + _TOGETHER]
                latents = self._encoded(canvas, [clips[number] for number in part])
                results |= zip(part, latents, strict=True)
        return [results[number] for number in range(len(clips))]

    def _canvas(self, size: Grid) -> Grid:
        for canvas in self.canvases:
            if all(have >= want for have, want in zip(canvas, size, strict=True)):
                return canvas
        raise UserError(f"a clip of {size.t}x{size.h}x{size.w} is larger than all that were announced")

    def _encoded(self, canvas: Grid, clips: Sequence[np.ndarray]) -> list[np.ndarray]:
        drawn = np.zeros((_TOGETHER, *canvas, 3), np.uint8)
        grid = latent_grid(canvas, self._stride)
        inside = np.zeros((_TOGETHER, grid.h, grid.w), bool)
        own = [latent_grid(Grid(*clip.shape[:3]), self._stride) for clip in clips]
        for row, (clip, size) in enumerate(zip(clips, own, strict=True)):
            drawn[row, : len(clip), : clip.shape[1], : clip.shape[2]] = clip
            inside[row, : size.h, : size.w] = True
        latents = np.asarray(encode_canvases(self._graph, self._params, drawn, inside), np.float32)
        return [latents[row, : size.t, : size.h, : size.w] for row, size in enumerate(own)]
