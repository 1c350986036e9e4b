"""Encoding of clips while they are read: the autoencoder over canvases, on all devices of a process.

A denoiser is then trained without a cache of latents.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float32, Int32, UInt8

from dit_video.core import pixels
from dit_video.core.errors import UserError
from dit_video.distributed import Parallelism, make_batch_sharding, make_mesh
from dit_video.models.autoencoders import AutoencoderConfig, latent_grid, merge_sizes
from dit_video.models.autoencoders.canvas import CANVAS_PIXELS
from dit_video.nn import get_graph_def
from dit_video.tokens import Grid


class CanvasEncoder:
    """The autoencoder over batches of canvases, which are sharded over the devices of this process.

    Args:
      autoencoder: Its config.
      params: Its parameters.
      canvas_pixels: Approximate number of pixels that a device encodes at once, over all frames of its canvases.
    """

    def __init__(self, autoencoder: AutoencoderConfig, params: dict[str, Any], *, canvas_pixels: int = CANVAS_PIXELS):
        mesh = make_mesh(Parallelism(), jax.local_devices())
        self._devices, self._split, self._pixels = mesh.size, make_batch_sharding(mesh), canvas_pixels
        self._graph = get_graph_def(autoencoder.make)
        self._params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))

    def compute_batch_size(self, size: Grid, count: int) -> int:
        """Return the number of canvases of a size in a batch, if there are `count`: a multiple of the devices.

        All batches of a size have that number, so that the size is compiled once.
        """
        on_device = -(-count // self._devices)
        batches = -(-on_device // max(1, self._pixels // size.volume))
        return self._devices * -(-on_device // batches)

    def __call__(
        self,
        canvases: UInt8[np.ndarray, "B T H W 3"],
        segment_ids: Int32[np.ndarray, "B h w"],
        is_known: Bool[np.ndarray, "B T #H #W"] | None = None,
    ) -> Array:
        """Return the latents [B t h w c] of canvases, without blocking.

        `segment_ids` are nonzero where a latent position belongs to a clip. Pixels that are not known are grey.
        """
        inputs = jax.device_put((canvases, segment_ids, is_known), self._split)
        return _encode_canvases(self._graph, self._params, *inputs)


@partial(jax.jit, static_argnums=0)
def _encode_canvases(
    graph: nnx.GraphDef, params: dict[str, Any], canvases: Array, segment_ids: Array, is_known: Array | None
) -> Array:
    clips = pixels.to_float(canvases)
    if is_known is not None:
        clips = jnp.where(is_known[..., None], clips, 0)
    return nnx.merge(graph, params).encode(clips, segment_ids)


class OnlineEncoder:
    """Encoder of clips of any sizes, by at most eight programs.

    A clip lies in the corner of the smallest canvas that holds it; the rest of the canvas is masked, so that its
    latents are those that it has alone.

    Args:
      autoencoder: The autoencoder's config.
      params: Its parameters.
      sizes: Sizes of all clips that will be encoded, in frames and pixels.
      calls: Number of calls that these clips arrive in. A batch holds as many canvases of a size as one call has on
        average, or as many as the devices encode at once. The unused part of a call's last batch is computed too.
      canvas_pixels: Approximate number of pixels that a device encodes at once.
    """

    def __init__(
        self,
        autoencoder: AutoencoderConfig,
        params: dict[str, Any],
        sizes: Sequence[Grid],
        *,
        calls: float | int = 1,
        canvas_pixels: int = CANVAS_PIXELS,
    ):
        self.canvases = merge_sizes(sizes)
        """Sizes of the canvases, by increasing volume."""
        self._encode = CanvasEncoder(autoencoder, params, canvas_pixels=canvas_pixels)
        self._stride = autoencoder.stride
        counts = Counter(self._find_canvas(size) for size in sizes)
        batch_size = self._encode.compute_batch_size
        self.batch_sizes = {canvas: batch_size(canvas, math.ceil(count / calls)) for canvas, count in counts.items()}
        """Number of canvases of each size in a batch."""

    def __call__(
        self,
        clips: Sequence[UInt8[np.ndarray, "_ _ _ 3"]],
        masks: Sequence[Bool[np.ndarray, "_ _ _"]] | None = None,
    ) -> list[Float32[np.ndarray, "_ _ _ c"]]:
        """Return the latents of the clips, in order; with masks, of the clips with all but the known pixels grey.

        Raises:
          UserError: If a clip is larger than all `sizes`.
        """
        by_canvas: dict[Grid, list[int]] = {}
        for number, clip in enumerate(clips):
            by_canvas.setdefault(self._find_canvas(Grid(*clip.shape[:3])), []).append(number)
        results: dict[int, np.ndarray] = {}
        computed: tuple[list[int], Array] | None = None
        for canvas, part in self._make_batches(by_canvas):
            known = None if masks is None else self._draw_masks(canvas, [masks[number] for number in part])
            latents = self._encode(*self._draw_canvases(canvas, [clips[number] for number in part]), known)
            if computed is not None:  # read the previous batch back while the devices encode this one
                results |= self._extract_latents(*computed, clips)
            computed = part, latents
        if computed is not None:
            results |= self._extract_latents(*computed, clips)
        return [results[number] for number in range(len(clips))]

    def _find_canvas(self, size: Grid) -> Grid:
        for canvas in self.canvases:
            if all(have >= want for have, want in zip(canvas, size, strict=True)):
                return canvas
        raise UserError(f"a clip of {size} is larger than all in sizes; include its size")

    def _make_batches(self, by_canvas: dict[Grid, list[int]]) -> Iterator[tuple[Grid, list[int]]]:
        for canvas, members in by_canvas.items():
            rows = self.batch_sizes[canvas]
            yield from ((canvas, members[first : first + rows]) for first in range(0, len(members), rows))

    def _draw_canvases(
        self, canvas: Grid, clips: Sequence[np.ndarray]
    ) -> tuple[UInt8[np.ndarray, "B T H W 3"], Int32[np.ndarray, "B h w"]]:
        rows, grid = self.batch_sizes[canvas], latent_grid(canvas, self._stride)
        drawn, inside = np.zeros((rows, *canvas, 3), np.uint8), np.zeros((rows, grid.h, grid.w), np.int32)
        for row, clip in enumerate(clips):
            grid_size = latent_grid(Grid(*clip.shape[:3]), self._stride)
            drawn[row, : len(clip), : clip.shape[1], : clip.shape[2]] = clip
            inside[row, : grid_size.h, : grid_size.w] = 1
        return drawn, inside

    def _draw_masks(self, canvas: Grid, masks: Sequence[np.ndarray]) -> Bool[np.ndarray, "B T H W"]:
        drawn = np.zeros((self.batch_sizes[canvas], *canvas), bool)
        for row, mask in enumerate(masks):
            drawn[row, : mask.shape[0], : mask.shape[1], : mask.shape[2]] = mask
        return drawn

    def _extract_latents(self, part: list[int], latents: Array, clips: Sequence[np.ndarray]) -> dict[int, np.ndarray]:
        values = np.asarray(latents, np.float32)
        results = {}
        for row, number in enumerate(part):
            grid_size = latent_grid(Grid(*clips[number].shape[:3]), self._stride)
            results[number] = values[row, : grid_size.t, : grid_size.h, : grid_size.w]
        return results
