"""What is known of a clip that is to be made, and how a denoiser is told of it."""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dit_video.core.errors import UserError
from dit_video.core.typing import AnyArray
from dit_video.tokens import segment_max, to_tokens


@dataclass(frozen=True, kw_only=True)
class KnownFrames:
    """In training the first latent frame of a clip is known, by chance; of an image nothing is.

    A first latent frame is the first frame of the clip alone, as the autoencoder is causal.

    Raises:
      UserError: a chance that is none.
    """

    chance: float = 0.5
    """That it is known; else the whole clip is made from its text, and what the denoiser would be given of the frame,
    latents, mask and an image encoder's tokens, is zero. Wan's models that animate an image are always given one: 1."""
    rest: Literal["zero", "grey"] = "zero"
    """What given latents hold of the frames behind a known one: zeros, or `grey`, the latents of the clip with those
    frames grey, as sampling and Wan's models have it; they are cached beside the clips' own."""

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
    tokens: Float[AnyArray, "B N p"],
    known: Bool[Array, "B N"],
    *,
    places: int,
    channels: int,
    shown: Bool[Array, "B N"] | None = None,
) -> Float[Array, "B N g"]:
    """What stands beside noisy tokens: at each place of a patch the mask, then the latents, zero where none is shown.

    The order of channels is that of Wan's models which animate an image (arXiv 2503.20314, section 5.1).

    Args:
      tokens: the latents.
      known: which tokens are.
      shown: of which tokens latents are shown; by default of those that are known.
      places: of a patch.
      channels: of mask and latents together; as many of the mask as the latents leave.
    """
    rows, count, width = tokens.shape
    mask = channels - width // places
    masks = jnp.broadcast_to(known[..., None, None], (rows, count, places, mask)).astype(jnp.float32)
    latents = jnp.where((known if shown is None else shown)[..., None], tokens, 0)
    latents = latents.reshape(rows, count, places, width // places)
    return jnp.concatenate([masks, latents], axis=-1).reshape(rows, count, places * channels)
