"""Extraction of features by a network that reads frames of one size, from clips of any size, in batches."""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float32, UInt8

from dit_video.core.errors import UserError
from dit_video.features.interpolation import resize_frames
from dit_video.nn import get_graph_def
from dit_video.video import Clip


@dataclass(frozen=True, kw_only=True)
class NetworkInput:
    """Frames that a network reads: squares, resized bilinearly without a filter against aliasing, as the references do.

    Clips keep their numbers of frames.
    """

    side: int
    """Height and width in pixels."""
    frames: int | None = None
    """Number of frames of every clip; None for any number."""
    min_frames: int = 1
    """Smallest number of frames of a clip."""
    has_aligned_corners: bool = False
    """True to map the centres of the corners' pixels to each other; False for the corners of the frame."""

    def check(self, clip: Clip) -> None:
        """Check that a clip has frames enough.

        Raises:
          UserError: it has not, or has not exactly as many as the network reads.
        """
        count = len(clip.frames)
        if count < self.min_frames or self.frames not in (None, count):
            needed = f"at least {self.min_frames}" if self.frames is None else f"exactly {self.frames}"
            raise UserError(
                f"a clip of {count} frames is invalid: this network reads {needed}. Use clips of that length, or "
                "another metric"
            )

    def resize(self, frames: UInt8[np.ndarray, "T H W 3"]) -> UInt8[np.ndarray, "T h w 3"]:
        """Return frames at the network's size, rounded to whole values, as they are stored."""
        return np.round(self.interpolate(frames)).astype(np.uint8)

    def interpolate(self, frames: UInt8[np.ndarray, "T H W 3"]) -> Float32[np.ndarray, "T h w 3"]:
        """Return frames at the network's size, in 0..255."""
        return np.asarray(_resize(frames, self.side, has_aligned_corners=self.has_aligned_corners))


def make_extractor(
    make: Callable[[nnx.Rngs], Any],
    params: Any,
    network_input: NetworkInput,
    *,
    batch: int,
    is_image: bool = False,
    output: Callable[[Any, Array], Array] | None = None,
) -> Callable[[Sequence[Clip]], Float32[np.ndarray, "n d"]]:
    """Return the function from clips to features of a network.

    Clips of a length share one program, whose batches are padded to one size for the computation only. This process's
    devices share a batch.

    Args:
      make: makes the network, whose call maps pixels in [-1, 1], `B T H W 3`, to features `B D`.
      params: its parameters.
      network_input: frames that it reads.
      batch: examples of a batch; at least one for each device.
      is_image: True for a network of images `B H W 3`; each frame of a clip is an example then.
      output: called with the network and its features, returns those to use; by default these.
    """
    graph, devices = get_graph_def(make), Mesh(jax.local_devices(), ("examples",))
    sharding = NamedSharding(devices, PartitionSpec("examples"))
    batch = max(1, batch // devices.size) * devices.size

    @jax.jit
    def apply(params: Any, pixels: Array) -> Array:
        model = nnx.merge(graph, params)
        features = model(pixels / 127.5 - 1)
        return features if output is None else output(model, features)

    @functools.cache
    def put_params() -> Any:
        # Not before features are extracted: metrics are opened before a training, which needs the memory.
        return jax.device_put(params, NamedSharding(devices, PartitionSpec()))

    def extract(clips: Sequence[Clip]) -> Float32[np.ndarray, "n d"]:
        for clip in clips:
            network_input.check(clip)
        features: dict[int, np.ndarray] = {}
        order = sorted(range(len(clips)), key=lambda index: len(clips[index].frames))
        for _, same in itertools.groupby(order, key=lambda index: len(clips[index].frames)):
            indices = list(same)
            for start in range(0, len(indices), batch):
                part = indices[start : start + batch]
                pixels = np.stack([network_input.interpolate(clips[index].frames) for index in part])
                features |= zip(part, _extract_batch(pixels), strict=True)
        return np.concatenate([features[index] for index in range(len(clips))])

    def _extract_batch(pixels: Float32[np.ndarray, "b T H W 3"]) -> list[Float32[np.ndarray, "_ d"]]:
        """Return the rows of each clip."""
        examples = pixels.reshape(-1, *pixels.shape[2:]) if is_image else pixels
        rows = []
        for start in range(0, len(examples), batch):
            part: np.ndarray = examples[start : start + batch]
            missing = np.zeros((batch - len(part), *part.shape[1:]), np.float32)
            examples_on_devices = jax.device_put(np.concatenate([part, missing]), sharding)
            rows.append(np.asarray(apply(put_params(), examples_on_devices))[: len(part)])
        return np.array_split(np.concatenate(rows), len(pixels))

    return extract


@jax.jit(static_argnames=("side", "has_aligned_corners"))
def _resize(frames: Array, side: int, *, has_aligned_corners: bool) -> Array:
    pixels = frames.astype(jnp.float32)
    return resize_frames(pixels, height=side, width=side, has_aligned_corners=has_aligned_corners)
