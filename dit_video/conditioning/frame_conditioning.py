"""Conditioning on the first frame of a clip: a mask of its tokens, and latents of it that the denoiser reads."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from dit_video.conditioning.records import ImageTokens
from dit_video.core.errors import UserError
from dit_video.core.typing import AnyArray
from dit_video.tokens import PackedRows

COND_LATENTS, IMAGE_TOKENS = "cond_latents", "image_tokens"
"""Names of fields: latents that a denoiser reads as conditioning; an image encoder's tokens of the first frame."""


@dataclass(frozen=True, kw_only=True)
class FrameConditioning:
    """Configuration of training in which the first latent frame of a clip is known at random; never that of an image.

    The autoencoder is causal: the first latent frame is the first frame of the clip alone.

    Raises:
      UserError: If `prob` is no probability.
    """

    prob: float = 0.5
    """Probability that the first frame is known. Otherwise the clip is generated from its text alone, and latents, mask
    and image tokens of the frame are zero. Wan's image-to-video models always get one: 1."""
    rest: Literal["zero", "grey"] = "zero"
    """Conditioning latents of the frames after a known one: zeros, or `grey`, the latents of the clip with these frames
    grey, as in Wan's models; they are cached with the clips' own latents. Sampling uses the same."""

    def __post_init__(self):
        if not 0 <= self.prob <= 1:
            raise UserError(f"prob={self.prob} is invalid: a probability must lie in [0, 1]. Use 0.5.")

    def draw_mask(self, layout: PackedRows, keys: Key[Array, "B G"]) -> Bool[Array, "B N"]:
        """Return True for the tokens of known frames, drawn from the keys of the examples."""
        return mask_first_frames(layout, jax.vmap(jax.vmap(jax.random.uniform))(keys) < self.prob)


def mask_first_frames(layout: PackedRows, is_conditioned: Bool[Array, "B G"]) -> Bool[Array, "B N"]:
    """Return the mask of the first latent frame's tokens, in the chosen segments that have other frames too."""
    frame_positions = jnp.asarray(layout.positions[..., 0])
    is_video = layout.max(frame_positions) > 0
    return layout.expand(is_conditioned & is_video) & (frame_positions == 0) & (layout.segments > 0)


def make_image_tokens(values: Float[AnyArray, "B I F"], layout: PackedRows) -> ImageTokens:
    """Return the record of a batch's image tokens, of which every segment has `I / G`."""
    return ImageTokens(jnp.asarray(values), layout.get_sequence_segments(values.shape[1] // layout.count))


def make_cond_latents(
    latents: Float[AnyArray, "B N p"],
    cond_mask: Bool[Array, "B N"],
    *,
    patch_volume: int,
    channels: int,
    visible: Bool[Array, "B N"] | None = None,
) -> Float[Array, "B N g"]:
    """Return the conditioning channels of tokens: per patch position the mask, then latents, zero where not visible.

    The order of channels is that of Wan's image-to-video models (arXiv 2503.20314, section 5.1).

    Args:
      latents: The latents, as tokens.
      cond_mask: Mask of the known tokens.
      patch_volume: Number of latent positions in a patch.
      channels: Number of mask and latent channels together; those that the latents leave belong to the mask.
      visible: Mask of the tokens whose latents are visible; the known ones by default.
    """
    rows, length, width = latents.shape
    mask_channels = channels - width // patch_volume
    masks = jnp.broadcast_to(cond_mask[..., None, None], (rows, length, patch_volume, mask_channels))
    values = jnp.where((cond_mask if visible is None else visible)[..., None], latents, 0)
    values = values.reshape(rows, length, patch_volume, width // patch_volume)
    return jnp.concatenate([masks.astype(jnp.float32), values], axis=-1).reshape(rows, length, patch_volume * channels)
