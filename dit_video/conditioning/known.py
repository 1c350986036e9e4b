"""Known first frames in training, and the conditioning latents of a denoiser."""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dit_video.core.errors import UserError
from dit_video.core.typing import AnyArray
from dit_video.tokens import expand_to_tokens, segment_max


@dataclass(frozen=True, kw_only=True)
class KnownFrames:
    """Configuration of training in which the first latent frame of a clip is known at random; never that of an image.

    The autoencoder is causal: the first latent frame is the first frame of the clip alone.

    Raises:
      UserError: If `chance` is no probability.
    """

    chance: float = 0.5
    """Probability that the first frame is known. Otherwise the clip is generated from its text alone, and latents, mask
    and image tokens of the frame are zero. Wan's image-to-video models always get one: 1."""
    rest: Literal["zero", "grey"] = "zero"
    """Conditioning latents of the frames after a known one: zeros, or `grey`, the latents of the clip with these frames
    grey, as in sampling and in Wan's models; they are cached with the clips' own latents."""

    def __post_init__(self):
        if not 0 <= self.chance <= 1:
            raise UserError(f"chance={self.chance} is invalid: a probability must lie in [0, 1]. Use 0.5.")


def mask_known_tokens(
    segments: Int[AnyArray, "B N"], positions: Float[AnyArray, "B N 3"], known: Bool[Array, "B G"]
) -> Bool[Array, "B N"]:
    """Return the mask of the first latent frame's tokens, in segments that are `known` and have other frames too."""
    frame_positions = jnp.asarray(positions[..., 0])
    is_video = segment_max(frame_positions, segments, count=known.shape[1]) > 0
    return expand_to_tokens(known & is_video, segments) & (frame_positions == 0) & (segments > 0)


def make_cond_latents(
    tokens: Float[AnyArray, "B N p"],
    known: Bool[Array, "B N"],
    *,
    patch_volume: int,
    channels: int,
    shown: Bool[Array, "B N"] | None = None,
) -> Float[Array, "B N g"]:
    """Return the conditioning channels of tokens: per patch position the mask, then the latents, zero where not shown.

    The order of channels is that of Wan's image-to-video models (arXiv 2503.20314, section 5.1).

    Args:
      tokens: The latents.
      known: Mask of the known tokens.
      shown: Mask of the tokens whose latents are shown; the known ones by default.
      patch_volume: Number of latent positions in a patch.
      channels: Number of mask and latent channels together; those that the latents leave belong to the mask.
    """
    rows, length, width = tokens.shape
    mask_channels = channels - width // patch_volume
    masks = jnp.broadcast_to(known[..., None, None], (rows, length, patch_volume, mask_channels)).astype(jnp.float32)
    latents = jnp.where((known if shown is None else shown)[..., None], tokens, 0)
    latents = latents.reshape(rows, length, patch_volume, width // patch_volume)
    return jnp.concatenate([masks, latents], axis=-1).reshape(rows, length, patch_volume * channels)
