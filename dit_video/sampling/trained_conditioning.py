"""Known pixels as a model gets them that is trained to complete clips (`FrameConditioning`).

Either it reads a mask and latents next to the noisy latents: those of the first frame, with zeros for the others, or,
as Wan's models, those of the clip in which all unknown pixels are grey; some models also read an image encoder's tokens
(2.1, and 2.2 A14B). Or the latents of known pixels are in the clip itself, clean, at time 0 (2.2 TI2V-5B).
"""

import numpy as np
from jaxtyping import Float32, UInt8

from dit_video.core.errors import UserError
from dit_video.models.autoencoders import latent_grid
from dit_video.models.conditioning import COND_LATENTS, IMAGE_TOKENS, KnownMask, find_known_latents, fold_mask
from dit_video.models.conditioning.masks import find_known_frames
from dit_video.sampling.known_pixels import KnownPixels
from dit_video.sampling.plan import CleanTokens, SamplingPlan
from dit_video.sampling.request import TaskModel
from dit_video.tokens import Field, Grid
from dit_video.video import Clip

IMAGE_IS_NEEDED = "this model needs an image; give image=, a clip of one frame or pixels [H W 3]"


def find_trained_part(known: KnownPixels, model: TaskModel) -> KnownMask | None:
    """Return the part of the known pixels that the model is trained with; None if it is trained with no such part.

    All of them, or the first frame, from which a model of images to video continues. Pixels of a strength below 1 have
    no equivalent in training.
    """
    conditioning, is_kept = model.frame_conditioning, known.strength == 1
    if conditioning is None:
        return None
    first = np.zeros_like(is_kept)
    first[0] = is_kept[0]
    candidates = [is_kept] if len(is_kept) == 1 or not is_kept[0].all() else [is_kept, first]
    accepted = (each for each in candidates if each.any() and conditioning.accepts(each))
    if model.image_encoder_folder is not None and model.backbone.image_positions is None:
        # Its image tokens are those of a first frame alone.
        return first if is_kept[0].all() and len(is_kept) > 1 else None
    return next(accepted, None)


def plan_trained(known: KnownPixels | None, size: Grid, model: TaskModel) -> SamplingPlan:
    """Return the plan of a clip of which a part, perhaps none, is known that the model is trained with.

    Raises:
      UserError: the model needs an image and there is none, or it is trained with other frames.
    """
    backbone, conditioning = model.backbone, model.frame_conditioning
    if conditioning is None:
        return SamplingPlan()
    if known is None and conditioning.prob == 1:
        raise UserError(IMAGE_IS_NEEDED)
    if backbone.time == "token":
        return _plan_clean_tokens(known, size, model)
    fields: dict[Field, np.ndarray] = {}
    if backbone.cond_channels:
        field = Field(name=COND_LATENTS, alignment="grid", shape=(backbone.cond_channels,))
        fields[field] = _make_cond_latents(known, size, model)
    if model.image_encoder_folder is not None:
        tokens = _encode_tokens(known, model)
        fields[Field(name=IMAGE_TOKENS, alignment="sequence", shape=tokens.shape[1:], length=len(tokens))] = tokens
    return SamplingPlan(fields)


def _plan_clean_tokens(known: KnownPixels | None, size: Grid, model: TaskModel) -> SamplingPlan:
    """Return the plan of a model with a time per token."""
    transform, config = CleanTokens(), model.codec.config
    if known is None:
        return SamplingPlan(transform=transform)
    grid = latent_grid(size, config.stride)
    fields = {field: np.zeros(field.get_shape(grid), np.float32) for field in transform.list_fields(config.channels)}
    clean, mask = fields.values()
    if find_known_frames(known.is_known) == [0]:
        # The autoencoder is causal: the first latent frame is that of the first frame alone.
        clean[:1], mask[:1] = _encode_frame(known.frames[0], model), 1
    else:
        clean[:] = model.codec.encode_pixels(known.blank())
        mask[find_known_latents(known.is_known, config.stride)] = 1
    return SamplingPlan(fields, transform=transform)


def _make_cond_latents(known: KnownPixels | None, size: Grid, model: TaskModel) -> Float32[np.ndarray, "t h w g"]:
    """Return the mask's channels, followed by the latents; zero if nothing is known, as in training."""
    assert model.frame_conditioning is not None
    stride, channels = model.codec.config.stride, model.codec.config.channels
    grid, count = latent_grid(size, stride), model.backbone.cond_channels
    if known is None:
        return np.zeros((*grid, count), np.float32)
    if model.frame_conditioning.rest == "zero":
        cond_latents = np.zeros((*grid, count), np.float32)
        cond_latents[:1, ..., : count - channels] = 1
        cond_latents[:1, ..., count - channels :] = _encode_frame(known.frames[0], model)
        return cond_latents
    cond_latents = np.concatenate([fold_mask(known.is_known, stride), model.codec.encode_pixels(known.blank())], -1)
    if cond_latents.shape[-1] != count:
        raise UserError(
            f"the denoiser reads {count} channels of masks and clean latents, but this autoencoder makes "
            f"{cond_latents.shape[-1]}; use the autoencoder that it was trained with"
        )
    return cond_latents


def _encode_frame(frame: UInt8[np.ndarray, "H W 3"], model: TaskModel) -> Float32[np.ndarray, "1 h w c"]:
    return model.codec.encode(Clip(frame[None], fps=1.0))


def _encode_tokens(known: KnownPixels | None, model: TaskModel) -> Float32[np.ndarray, "i F"]:
    """Return the image encoder's tokens of the known frames, the first one or the first and the last one."""
    count = 1 if model.backbone.image_positions is None else 2
    if known is None:
        length, width = model.image_encoder.shape
        return np.zeros((count * length, width), np.float32)
    frames = find_known_frames(known.is_known) or []
    if len(frames) != count:
        kinds = ("the first image alone", "the first and the last image (image= and last_image=)")
        raise UserError(f"this model was trained with {kinds[count - 1]}; give exactly that")
    return np.concatenate(list(model.image_encoder(known.frames[frames])))
