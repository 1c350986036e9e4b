"""What is known of a clip that is to be made, and how a denoiser is told of it."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dit_video.arrays import AnyArray
from dit_video.errors import UserError
from dit_video.tokens import segment_max, to_tokens


@dataclass(frozen=True, kw_only=True)
class KnownFrames:
    """In training the first latent frame of a clip is known, by chance; of an image nothing is.

    A first latent frame is the first frame of the clip alone, as the autoencoder is causal.

    Raises:
      UserError: a chance that is none.
    """

    chance: float = 0.5
    """that it is known; else the whole clip is made from its text"""

    def __post_init__(self):
        if not 0 <= self.chance <= 1:
            raise UserError(f"the chance {self.chance} that a first frame is known must lie in [0, 1]")


def known_tokens(
    segments: Int[AnyArray, "B N"], coordinates: Float[AnyArray, "B N 3"], known: Bool[Array, "B G"]
) -> Bool[Array, "B N"]:
    """The tokens of the first latent frame of those segments whose first frame is `known` and that have others."""
    at = jnp.asarray(coordinates[..., 0])
    longer = segment_max(at, segments, count=known.shape[1]) > 0
    return to_tokens(known & longer, segments) & (at == 0) & (segments > 0)


def given_latents(
    tokens: Float[AnyArray, "B N p"], known: Bool[Array, "B N"], *, places: int, channels: int
) -> Float[Array, "B N g"]:
    """What stands beside noisy tokens: at each place of a patch the mask, then the clean latents, zero where unknown.

    The order of channels is that of Wan's models which animate an image (arXiv 2503.20314, section 5.1).

    Args:
      tokens: the clean latents.
      known: which tokens are.
      places: of a patch.
      channels: of mask and latents together; as many of the mask as the latents leave.
    """
    rows, count, width = tokens.shape
    mask = channels - width // places
    shown = jnp.broadcast_to(known[..., None, None], (rows, count, places, mask)).astype(jnp.float32)
    latents = jnp.where(known[..., None], tokens, 0).reshape(rows, count, places, width // places)
    return jnp.concatenate([shown, latents], axis=-1).reshape(rows, count, places * channels)
