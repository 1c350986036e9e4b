"""Image to video: clips that begin, or end, with an image.

A model gets it as it did in training (`FrameConditioning`). Either it reads a mask and latents next to the noisy
latents: those of the first frame, with zeros for the others, or, as Wan's models, those of the clip in which all
unknown pixels are grey; some models also read an image encoder's tokens (2.1, and 2.2 A14B). Or the first latent frame
is the image's, clean, at time 0 (2.2 TI2V-5B).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, UInt8

from dit_video.autoencoders import latent_grid
from dit_video.conditioning import COND_LATENTS, IMAGE_TOKENS, fill_unknown_frames, fold_frame_mask
from dit_video.core.errors import UserError
from dit_video.generation.pictures import fit_image
from dit_video.generation.plan import CleanTokens, SamplingPlan
from dit_video.generation.request import GenerationTask, Request, TaskModel
from dit_video.tokens import Field, Grid
from dit_video.video import Clip

Frames = Mapping[int, UInt8[np.ndarray, "H W 3"]]
"""Known frames of a clip, by number."""


@dataclass(frozen=True, kw_only=True)
class ImageToVideo(GenerationTask):
    """Clips with a given first or last frame: the request's `image` and `last_image`, fitted to the clip's size."""

    def __call__(self, request: Request, model: TaskModel) -> SamplingPlan:
        """Return the plan of a request with images.

        Raises:
          UserError: an image that the model does not accept, or none where it needs one.
        """
        request.check_pictures(("image", "last_image"))
        size, conditioning = request.grid, model.frame_conditioning
        accepts_last = conditioning is not None and conditioning.rest == "grey"
        frames = {}
        for name, pixels, index in (("first", request.image, 0), ("last", request.last_image, size.t - 1)):
            if pixels is None:
                continue
            field = "image" if name == "first" else "last_image"
            if conditioning is None or not (name == "first" or accepts_last):
                rule = f"this model does not accept a clip's {name} image"
                raise UserError(f"{field}= is invalid: {rule}. Use a model that was trained with it")
            if index in frames:
                raise UserError(f"{field}= is invalid: a clip of one frame has one image. Use image= alone")
            frames[index] = fit_image(pixels, size)
        if 0 not in frames:
            raise UserError(_IMAGE_IS_NEEDED)
        return plan_frames(frames, request, model)


_IMAGE_IS_NEEDED = "this model needs an image; give image=, a clip of one frame or pixels [H W 3]"


def plan_frames(frames: Frames, request: Request, model: TaskModel) -> SamplingPlan:
    """Return the plan of a clip of which some frames, perhaps none, are known, as the model was trained with them.

    Raises:
      UserError: the model needs an image and there is none, or it was trained with other frames.
    """
    backbone, conditioning, size = model.backbone, model.frame_conditioning, request.grid
    if conditioning is None:
        return SamplingPlan()
    if not frames and conditioning.prob == 1:
        raise UserError(_IMAGE_IS_NEEDED)
    if backbone.time == "token":
        return _plan_clean_frames(frames, size, model)
    fields: dict[Field, np.ndarray] = {}
    if backbone.cond_channels:
        field = Field(name=COND_LATENTS, alignment="grid", shape=(backbone.cond_channels,))
        fields[field] = _make_cond_latents(frames, size, model)
    if model.image_encoder_folder is not None:
        tokens = _encode_tokens(list(frames.values()), model)
        fields[Field(name=IMAGE_TOKENS, alignment="sequence", shape=tokens.shape[1:], length=len(tokens))] = tokens
    return SamplingPlan(fields)


def _plan_clean_frames(frames: Frames, size: Grid, model: TaskModel) -> SamplingPlan:
    """Return the plan of a model with a time per token."""
    transform = CleanTokens()
    if not frames:
        return SamplingPlan(transform=transform)
    config = model.codec.config
    grid = latent_grid(size, config.stride)
    fields = {field: np.zeros(field.get_shape(grid), np.float32) for field in transform.list_fields(config.channels)}
    clean, mask = fields.values()
    clean[:1], mask[:1] = _encode_frame(frames[0], model), 1
    return SamplingPlan(fields, transform=transform)


def _make_cond_latents(frames: Frames, size: Grid, model: TaskModel) -> Float32[np.ndarray, "t h w g"]:
    """Return the mask's channels, followed by the latents of the frames; zero without any, as in training."""
    assert model.frame_conditioning is not None
    stride, channels = model.codec.config.stride, model.codec.config.channels
    grid, count = latent_grid(size, stride), model.backbone.cond_channels
    if not frames:
        return np.zeros((*grid, count), np.float32)
    if model.frame_conditioning.rest == "zero":
        cond_latents = np.zeros((*grid, count), np.float32)
        cond_latents[:1, ..., : count - channels] = 1
        cond_latents[:1, ..., count - channels :] = _encode_frame(frames[0], model)
        return cond_latents
    pixels, is_known = fill_unknown_frames(dict(frames), size.t)
    latents, mask = model.codec.encode_pixels(pixels), fold_frame_mask(is_known, stride.t)
    masks = np.broadcast_to(mask[:, None, None], (*grid, mask.shape[1]))
    cond_latents = np.concatenate([masks, latents], -1)
    if cond_latents.shape[-1] != count:
        raise UserError(
            f"the denoiser reads {count} channels of masks and clean latents, but this autoencoder makes "
            f"{cond_latents.shape[-1]}; use the autoencoder that it was trained with"
        )
    return cond_latents


def _encode_frame(frame: UInt8[np.ndarray, "H W 3"], model: TaskModel) -> Float32[np.ndarray, "1 h w c"]:
    return model.codec.encode(Clip(frame[None], fps=1.0))


def _encode_tokens(frames: list[np.ndarray], model: TaskModel) -> Float32[np.ndarray, "i F"]:
    count = 1 if model.backbone.image_positions is None else 2
    if not frames:
        length, width = model.image_encoder.shape
        return np.zeros((count * length, width), np.float32)
    if len(frames) != count:
        kinds = ("the first image alone", "the first and the last image (image= and last_image=)")
        raise UserError(f"this model was trained with {kinds[count - 1]}; give exactly that")
    return np.concatenate(list(model.image_encoder(np.stack(frames))))
