"""What training gives a denoiser of a known first frame, checked against what it takes."""

from dit_video.autoencoders import AutoencoderConfig
from dit_video.backbones.dit import DitConfig
from dit_video.backbones.wan import WanDitConfig
from dit_video.conditioning import KnownFrames
from dit_video.core.errors import UserError


def check_given_frames(
    dit: DitConfig | WanDitConfig,
    autoencoder: AutoencoderConfig,
    known: KnownFrames | None,
    image_encoder: str | None,
    *,
    cached: bool,
) -> None:
    """That the denoiser is given what it takes.

    Args:
      dit: the denoiser.
      autoencoder: that makes its latents.
      known: what is known of a clip.
      image_encoder: folder of that whose tokens of the first frame the denoiser attends to.
      cached: whether latents are cached.

    Raises:
      UserError: it is not.
    """
    attends = isinstance(dit, WanDitConfig) and dit.image_width is not None
    if dit.given_channels and known is None:
        raise UserError("the denoiser takes given latents: say what is known of a clip with known=KnownFrames()")
    if dit.given_channels and dit.given_channels <= dit.channels:
        raise UserError(
            f"{dit.given_channels} given channels have no room for a mask beside the latents' {dit.channels}; set "
            f"given_channels={dit.channels + 1} or more"
        )
    if known is not None and not dit.given_channels and dit.time != "token" and not attends:
        raise UserError(
            "the denoiser can't be told which frames are known; leave out known, or give it given_channels or "
            "time='token'"
        )
    if known is not None and known.rest == "grey":
        _check_grey(dit, autoencoder, cached=cached)
    if isinstance(dit, WanDitConfig) and dit.image_width is not None:
        _check_image(dit, known, image_encoder, cached=cached)
    elif image_encoder is not None:
        raise UserError("the denoiser attends to no image's tokens; leave out image_encoder")


def _check_grey(dit: DitConfig | WanDitConfig, autoencoder: AutoencoderConfig, *, cached: bool) -> None:
    wanted = autoencoder.stride.t + autoencoder.channels
    if dit.given_channels != wanted:
        raise UserError(
            f"a first frame with grey behind it takes {wanted} given channels, a mask of {autoencoder.stride.t} and "
            f"the latents' {autoencoder.channels}; the denoiser has {dit.given_channels}, use rest='zero'"
        )
    if not cached:
        raise UserError("first frames with grey behind them lie beside cached latents; set data cache_latents=True")


def _check_image(dit: WanDitConfig, known: KnownFrames | None, image_encoder: str | None, *, cached: bool) -> None:
    if known is None:
        raise UserError(
            "the denoiser attends to the tokens of a first frame: say how often that is known with "
            "known=KnownFrames(chance=1.0)"
        )
    if image_encoder is None:
        raise UserError("the denoiser attends to an image encoder's tokens: name its folder with image_encoder")
    if dit.image_positions is not None:
        raise UserError(
            "the denoiser attends to the tokens of a first and a last frame, training gives it those of the first "
            "alone; take one without image_positions"
        )
    if not cached:
        raise UserError("an image encoder's tokens lie beside cached latents; set data cache_latents=True")
