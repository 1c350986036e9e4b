"""No autoencoder: latents are pixels, for models in pixel space."""

from dataclasses import dataclass

from flax import nnx

from dit_video.models.autoencoders.interface import Latents, Pixels, SegmentIds
from dit_video.nn import ConvCache
from dit_video.tokens import Grid


@dataclass(frozen=True, kw_only=True)
class IdentityConfig:
    """Configuration of `IdentityAutoencoder`, which has no parameters."""

    stride: Grid = Grid(1, 1, 1)
    channels: int = 3
    last_layer: str = ""

    def make(self, rngs: nnx.Rngs) -> "IdentityAutoencoder":
        return IdentityAutoencoder()


class IdentityAutoencoder(nnx.Module):
    """Pixels as latents."""

    def encode(self, pixels: Pixels, segment_ids: SegmentIds = None, cache: ConvCache | None = None) -> Latents:
        return pixels

    def decode(self, latents: Latents, cache: ConvCache | None = None) -> Pixels:
        return latents
