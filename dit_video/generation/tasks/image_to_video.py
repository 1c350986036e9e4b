"""Image conditioning: clips that begin, or end, with a given image.

A model gets it as it did in training (`FrameConditioning`). Either it reads a mask and latents next to the noisy
latents: those of the first frame, with zeros for the others, or, as Wan's models, those of the clip in which all
unknown pixels are grey; some models also read an image encoder's tokens (2.1, and 2.2 A14B). Or the first latent frame
is the image's, clean, at time 0 (2.2 TI2V-5B).
"""

import functools
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, UInt8

from dit_video.autoencoders import latent_grid
from dit_video.backbones.protocol import BackboneConfig
from dit_video.conditioning import (
    COND_LATENTS,
    IMAGE_TOKENS,
    FrameConditioning,
    fill_unknown_frames,
    fold_frame_mask,
)
from dit_video.core.errors import UserError
from dit_video.encoders.autoencoder import LatentCodec
from dit_video.encoders.image import FrozenImageEncoder
from dit_video.generation.conditioning import CLEAN_LATENTS
from dit_video.tokens import Grid
from dit_video.video import Clip

Image = Clip | UInt8[np.ndarray, "H W 3"]
"""A clip of one frame, or its pixels."""
_Fields = dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class ImageConditioner:
    """Conditioning of clips on their first and last image; the image encoder is read when the first image arrives."""

    backbone: BackboneConfig
    codec: LatentCodec
    frame_conditioning: FrameConditioning | None
    """Conditioning that the denoiser was trained with; None for a model without it."""
    image_encoder: str | None
    """Folder of the image encoder whose tokens it attends to."""

    def __call__(self, size: Grid, image: Image | None, last_image: Image | None) -> _Fields:
        """Return the conditioning fields of a clip of `size`, in pixels, from its first and its last image.

        Raises:
          UserError: an image of another size than the clip's, one that the model does not accept, or none where it
            needs one.
        """
        frames, conditioning = {}, self.frame_conditioning
        accepts_last = conditioning is not None and conditioning.rest == "grey"
        for name, pixels, index in (("first", image, 0), ("last", last_image, size.t - 1)):
            if pixels is None:
                continue
            if conditioning is None or not (name == "first" or accepts_last):
                raise UserError(f"this model does not accept a clip's {name} image; use one that was trained with it")
            frames[index] = _check_image(pixels, size)
        if conditioning is None:
            return {}
        if image is None and (frames or conditioning.prob == 1):
            raise UserError("this model needs an image; give image=, a clip of one frame or pixels [H W 3]")
        if self.backbone.time == "token":
            return {CLEAN_LATENTS: self._encode_frame(frames[0])} if frames else {}
        fields: _Fields = {COND_LATENTS: self._make_cond_latents(frames, size)} if self.backbone.cond_channels else {}
        if self.image_encoder is not None:
            fields[IMAGE_TOKENS] = self._encode_tokens(list(frames.values()))
        return fields

    def _make_cond_latents(self, frames: dict[int, np.ndarray], size: Grid) -> Float32[np.ndarray, "t h w g"]:
        """Return the mask's channels, followed by the latents of the frames; zero without any, as in training."""
        assert self.frame_conditioning is not None
        stride, channels = self.codec.config.stride, self.codec.config.channels
        grid, count = latent_grid(size, stride), self.backbone.cond_channels
        if not frames:
            return np.zeros((*grid, count), np.float32)
        if self.frame_conditioning.rest == "zero":
            cond_latents = np.zeros((*grid, count), np.float32)
            cond_latents[:1, ..., : count - channels] = 1
            cond_latents[:1, ..., count - channels :] = self._encode_frame(frames[0])
            return cond_latents
        pixels, is_known = fill_unknown_frames(frames, size.t)
        latents, mask = self.codec.encode_pixels(pixels), fold_frame_mask(is_known, stride.t)
        masks = np.broadcast_to(mask[:, None, None], (*grid, mask.shape[1]))
        cond_latents = np.concatenate([masks, latents], -1)
        if cond_latents.shape[-1] != count:
            raise UserError(
                f"the denoiser reads {count} channels of masks and clean latents, but this autoencoder makes "
                f"{cond_latents.shape[-1]}; use the autoencoder that it was trained with"
            )
        return cond_latents

    def _encode_frame(self, frame: UInt8[np.ndarray, "H W 3"]) -> Float32[np.ndarray, "1 h w c"]:
        return self.codec.encode(Clip(frame[None], fps=1.0))

    def _encode_tokens(self, frames: list[np.ndarray]) -> Float32[np.ndarray, "i F"]:
        count = 1 if self.backbone.image_positions is None else 2
        if not frames:
            length, width = self._encoder.shape
            return np.zeros((count * length, width), np.float32)
        if len(frames) != count:
            kinds = ("the first image alone", "the first and the last image (image= and last_image=)")
            raise UserError(f"this model was trained with {kinds[count - 1]}; give exactly that")
        return np.concatenate(list(self._encoder(np.stack(frames))))

    @functools.cached_property
    def _encoder(self) -> FrozenImageEncoder:
        assert self.image_encoder is not None
        return FrozenImageEncoder(self.image_encoder)


def _check_image(image: Image, size: Grid) -> UInt8[np.ndarray, "H W 3"]:
    frames = image.frames if isinstance(image, Clip) else np.asarray(image)[None]
    if frames.shape != (1, size.h, size.w, 3) or frames.dtype != np.uint8:
        raise UserError(
            f"an image must be a clip of one frame or uint8 pixels, [{size.h} {size.w} 3] for this size, not "
            f"{frames.dtype} {list(frames.shape[1:] if len(frames) == 1 else frames.shape)}; resize it "
            "(dit_video.core.resize.resize), or request a clip of its size"
        )
    return frames[0]
