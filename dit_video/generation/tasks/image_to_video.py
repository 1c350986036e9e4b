"""Image conditioning: clips that begin, or end, with a given image.

Two methods, both Wan's. Either the unknown pixels are grey, all frames are encoded, and the model reads the mask and
the latents next to the noisy latents; some models also read an image encoder's tokens (2.1, and 2.2 A14B). Or the first
latent frame is the image's, clean, at time 0 (2.2 TI2V-5B).
"""

import functools

import numpy as np
from jaxtyping import Float32, UInt8

from dit_video.conditioning import fill_unknown_frames, fold_frame_mask
from dit_video.core.errors import UserError
from dit_video.encoders.autoencoder import LatentCodec
from dit_video.encoders.image import FrozenImageEncoder
from dit_video.generation import GivenClip
from dit_video.pipelines.config import Image, PipelineConfig
from dit_video.tokens import Grid
from dit_video.video import Clip


class ImageConditioner:
    """Conditioning of clips on their first and last image; the image encoder is read when the first image arrives."""

    def __init__(self, config: PipelineConfig, codec: LatentCodec):
        self._config, self._codec = config, codec

    def __call__(self, size: Grid, image: Image | None, last_image: Image | None) -> GivenClip:
        """Return the conditioning of a clip of `size`, in pixels, from its first and its last image.

        Raises:
          UserError: an image of another size than the clip's, one that the model does not accept, or none where it
            needs one.
        """
        dit = self._config.dit
        accepted = {"first": bool(dit.cond_channels) or dit.time == "token", "last": bool(dit.cond_channels)}
        frames = {}
        for name, pixels, index in (("first", image, 0), ("last", last_image, size.t - 1)):
            if pixels is None:
                continue
            if not accepted[name]:
                raise UserError(f"this model does not accept a clip's {name} image; use one that was trained with it")
            frames[index] = _check_image(pixels, size)
        if dit.cond_channels:
            if image is None:
                raise UserError("this model needs an image; give image=, a clip of one frame or pixels [H W 3]")
            latents, tokens = self._encode_with_mask(frames, size), self._encode_tokens(list(frames.values()))
            return GivenClip(beside=latents, image=tokens)
        if not frames:
            return GivenClip()
        return GivenClip(known=self._codec.encode(Clip(frames[0][None], self._config.fps)))

    def _encode_with_mask(self, frames: dict[int, np.ndarray], size: Grid) -> Float32[np.ndarray, "t h w g"]:
        """Return the mask's channels, followed by the latents of the frames."""
        pixels, known = fill_unknown_frames(frames, size.t)
        latents = self._codec.encode_pixels(pixels)
        mask = fold_frame_mask(known, self._config.autoencoder.stride.t)
        masks = np.broadcast_to(mask[:, None, None], (*latents.shape[:3], mask.shape[1]))
        cond_latents = np.concatenate([masks, latents], -1)
        if cond_latents.shape[-1] != self._config.dit.cond_channels:
            raise UserError(
                f"the denoiser reads {self._config.dit.cond_channels} channels of masks and clean latents, but "
                f"this autoencoder makes {cond_latents.shape[-1]}; use the autoencoder that it was trained with"
            )
        return cond_latents

    def _encode_tokens(self, frames: list[np.ndarray]) -> Float32[np.ndarray, "i F"] | None:
        if self._config.image_encoder is None:
            return None
        count = 1 if getattr(self._config.dit, "image_positions", None) is None else 2
        if len(frames) != count:
            kinds = ("the first image alone", "the first and the last image (image= and last_image=)")
            raise UserError(f"this model was trained with {kinds[count - 1]}; give exactly that")
        return np.concatenate(list(self._encoder(np.stack(frames))))

    @functools.cached_property
    def _encoder(self) -> FrozenImageEncoder:
        assert self._config.image_encoder is not None
        return FrozenImageEncoder(self._config.image_encoder)


def _check_image(image: Image, size: Grid) -> UInt8[np.ndarray, "H W 3"]:
    frames = image.frames if isinstance(image, Clip) else np.asarray(image)[None]
    if frames.shape != (1, size.h, size.w, 3) or frames.dtype != np.uint8:
        raise UserError(
            f"an image must be a clip of one frame or uint8 pixels, [{size.h} {size.w} 3] for this size, not "
            f"{frames.dtype} {list(frames.shape[1:] if len(frames) == 1 else frames.shape)}; resize it "
            "(dit_video.core.resize.resize), or request a clip of its size"
        )
    return frames[0]
