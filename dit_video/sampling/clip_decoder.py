"""Decoding of sampled latents to clips, those of one size together."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32

from dit_video.data.latents.codec import LatentCodec
from dit_video.sampling.request import Request
from dit_video.tokens import Grid
from dit_video.video import Clip

_BATCH = 8
"""Number of clips that are decoded at once on one device."""


class ClipDecoder(NamedTuple):
    """A codec on one device, and one that shares clips among devices."""

    codec: LatentCodec
    fps: float
    """Frame rate of the clips."""
    shared: LatentCodec | None = None
    """Codec whose devices share the clips of a size; None for one device."""
    device_count: int = 1
    """Number of devices of the shared codec, which the number of its clips is padded to."""

    def check_memory(self, grids: Sequence[Grid]) -> None:
        """Check that clips of these latent grids can be decoded in the codec's memory, before they are sampled.

        Raises:
          UserError: they cannot.
        """
        for grid, count in Counter(grids).items():
            codec, batch = self._choose_codec(count)
            codec.get_chunk_length("decode", batch, grid)

    def __call__(self, latents: Sequence[Float32[np.ndarray, "_ _ _ c"]], requests: Sequence[Request]) -> list[Clip]:
        """Decode the latents of requests to clips: those of one size together, so that a size compiles once."""
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for index, values in enumerate(latents):
            by_shape.setdefault(values.shape, []).append(index)
        clips: dict[int, Clip] = {}
        for members in by_shape.values():
            codec, batch = self._choose_codec(len(members))
            for start in range(0, len(members), batch):
                part = members[start : start + batch]
                stacked = np.stack([latents[index] for index in part] + [latents[part[-1]]] * (batch - len(part)))
                seeds = [requests[index].seed for index in part] + [0] * (batch - len(part))
                for index, decoded in zip(part, codec.decode_many(stacked, seeds=seeds), strict=False):
                    clips[index] = Clip(frames=decoded, fps=self.fps, caption=requests[index].prompt)
        return [clips[index] for index in range(len(latents))]

    def _choose_codec(self, count: int) -> tuple[LatentCodec, int]:
        """Return the codec for clips of one size, and how many of them it decodes at once."""
        if self.shared is not None and count > 1:
            return self.shared, self.device_count
        return self.codec, min(_BATCH, count)
