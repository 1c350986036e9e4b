"""Checks of the frame conditioning that a denoiser is trained with."""

from dit_video.core.errors import UserError
from dit_video.models.autoencoders import AutoencoderConfig
from dit_video.models.backbones.protocol import BackboneConfig
from dit_video.models.conditioning import FrameConditioning


def check_frame_conditioning(
    backbone: BackboneConfig,
    autoencoder: AutoencoderConfig,
    frames: FrameConditioning | None,
    image_encoder: str | None,
    *,
    cached: bool,
) -> None:
    """Check that training provides the frame conditioning that the denoiser reads, and no other.

    Args:
      backbone: the denoiser.
      autoencoder: autoencoder of its latents.
      frames: conditioning on known frames.
      image_encoder: folder of the image encoder whose tokens of the first frame the denoiser attends to.
      cached: True if latents are cached.

    Raises:
      UserError: it does not.
    """
    attends, channels = backbone.image_width is not None, backbone.cond_channels
    if channels and frames is None:
        raise UserError("the denoiser reads conditioning latents, but frame_conditioning=None; set FrameConditioning()")
    if channels and channels <= backbone.channels:
        raise UserError(
            f"cond_channels={channels} is invalid: a mask needs channels. Use at least {backbone.channels + 1}"
        )
    if frames is not None and not channels and backbone.time != "token" and not attends:
        raise UserError(
            "frame_conditioning is invalid: the denoiser needs cond_channels or time='token'; set one, or leave it out"
        )
    if frames is not None and frames.rest == "grey":
        _check_grey(backbone, autoencoder, frames, cached=cached)
    if frames is not None and frames.has_mask_mix and attends:
        raise UserError("masks are invalid: image tokens are of a first frame. Use masks=(FirstFrame(),)")
    if attends:
        _check_image(backbone, frames, image_encoder, cached=cached)
    elif image_encoder is not None:
        raise UserError("image_encoder is invalid: the denoiser attends to no image tokens; leave out image_encoder")


def _check_grey(
    backbone: BackboneConfig, autoencoder: AutoencoderConfig, frames: FrameConditioning, *, cached: bool
) -> None:
    required = autoencoder.stride.t + autoencoder.channels
    has_clean_tokens = backbone.time == "token" and not backbone.cond_channels and frames.has_mask_mix
    if backbone.cond_channels != required and not has_clean_tokens:
        raise UserError(
            f"cond_channels={backbone.cond_channels} is invalid: with rest='grey' it must be {required}, a mask of "
            f"{autoencoder.stride.t} and the latents' {autoencoder.channels}; use rest='zero'"
        )
    if not cached and not frames.has_mask_mix:
        raise UserError("rest='grey' needs cached latents; set data cache_latents=True")


def _check_image(
    backbone: BackboneConfig, frames: FrameConditioning | None, image_encoder: str | None, *, cached: bool
) -> None:
    if frames is None:
        raise UserError(
            "the denoiser attends to a first frame, but frame_conditioning=None; set FrameConditioning(prob=1.0)"
        )
    if image_encoder is None:
        raise UserError("the denoiser attends to an image encoder's tokens; set image_encoder to its folder")
    if backbone.image_positions is not None:
        raise UserError("image_positions needs a last frame, which training does not provide; use a model without it")
    if not cached:
        raise UserError("an image encoder's tokens need cached latents; set data cache_latents=True")
