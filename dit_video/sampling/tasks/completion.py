"""Completion of clips: text to video, images to video, extension, interpolation, inpainting, outpainting and editing.

All of them are one mechanism. A request has known pixels, those of images, clips and masks, and sampling completes
them: as the model was trained, or without training, by replacement of the known latents after every step.
"""

import warnings
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32

from dit_video.core.errors import UserError
from dit_video.models.conditioning import (
    KnownMask,
    find_any_known,
    find_known_latents,
    find_partly_known_latents,
    split_cells,
)
from dit_video.sampling.known_pixels import KnownPixels, collect_known_pixels, fit_clip
from dit_video.sampling.plan import SamplingPlan, TransformSequence
from dit_video.sampling.replacement import LatentReplacement, PixelReplacement
from dit_video.sampling.request import OPTIONS, GenerationTask, Request, TaskModel
from dit_video.sampling.trained_conditioning import IMAGE_IS_NEEDED, find_trained_part, plan_trained

_MAX_DIFFERENCE = 0.05
"""Largest difference of latents, of which the standard deviation is about 1, that counts as rounding."""
_ACCEPTED = ("image", "last_image", "video", "mask", "conditions", *OPTIONS)


@dataclass(frozen=True, kw_only=True)
class Completion(GenerationTask):
    """Clips that keep the known pixels of a request, or that start from its `video`; without them, text to video."""

    def __call__(self, request: Request, model: TaskModel) -> SamplingPlan:
        """Return the plan of a request.

        Raises:
          UserError: pictures, a strength or a method that do not fit the request or the model.
        """
        request.check_pictures(_ACCEPTED)
        _check_options(request)
        known = collect_known_pixels(request)
        trained_mask = None if known is None else _choose_trained_mask(known, request, model)
        trained = None if known is None or trained_mask is None else known.select(trained_mask)
        plan = plan_trained(trained, request.grid, model)._replace(method="" if trained is None else "trained")
        if known is not None:
            plan = _add_replacement(plan, known, trained_mask, request, model)
        if request.video is not None and request.strength is not None and request.strength < 1:
            start = model.codec.encode_pixels(fit_clip("video", request.video, request.grid))
            plan = plan._replace(start=start, start_time=float(request.strength))
        return plan


def _check_options(request: Request) -> None:
    if request.video is not None and request.mask is None and request.strength is None:
        raise UserError("video= is invalid alone: say what of it is kept. Use mask=, or strength= for all of it")
    if request.strength is not None:
        if request.video is None:
            raise UserError(f"strength={request.strength} is invalid: it is that of a video. Use video=")
        if not 0 < request.strength <= 1:
            rule = "it must be above 0, which changes nothing, and at most 1"
            raise UserError(f"strength={request.strength} is invalid: {rule}. Use 0.6")
    if request.method not in ("auto", "trained", "training_free"):
        raise UserError(f"method={request.method!r} is invalid. Use auto, trained or training_free")
    if request.resample < 1:
        raise UserError(f"resample={request.resample} is invalid: steps are taken at least once. Use 1 or more")


def _choose_trained_mask(known: KnownPixels, request: Request, model: TaskModel) -> KnownMask | None:
    """Return the known pixels that are given to the model as in its training; None for none.

    Raises:
      UserError: the model is not trained for them, and the request does not allow another method.
    """
    conditioning = model.frame_conditioning
    needs_image = conditioning is not None and conditioning.prob == 1
    mask = find_trained_part(known, model)
    if request.method == "training_free":
        if needs_image:
            rule = "this model reads a first image in any case"
            raise UserError(f"method='training_free' is invalid: {rule}. Use method='auto'")
        return None
    is_complete = mask is not None and bool((mask == known.is_known).all(axis=(0, 1, 2)))
    if mask is None and needs_image:
        raise UserError(IMAGE_IS_NEEDED)
    if not is_complete:
        rule = "this model was not trained for what is known of the clip"
        if request.method == "trained":
            raise UserError(f"method='trained' is invalid: {rule}. Use method='auto', or a model that was")
        if request.method == "auto":
            warnings.warn(f"{rule}: it is kept without training, by replacement of latents", stacklevel=2)
    return mask


class _ReplacedLatents(NamedTuple):
    """Latents that sampling replaces, in one of two ways."""

    encoded: Float32[np.ndarray, "t h w c"]
    """Latents of the clip, whose unknown pixels are as the nearest known ones."""
    is_held: Bool[np.ndarray, "t h w"]
    """True for latents of known pixels, which `LatentReplacement` holds."""
    is_corrected: Bool[np.ndarray, "t h w"]
    """True for latents that also stand for, or depend on, unknown pixels: `PixelReplacement` corrects them."""


def _add_replacement(
    plan: SamplingPlan, known: KnownPixels, trained_mask: KnownMask | None, request: Request, model: TaskModel
) -> SamplingPlan:
    """Return the plan with the replacement of what the model is not trained to keep."""
    replaced = _find_replaced_latents(known, trained_mask, request, model)
    if replaced is None:
        return plan
    transform = LatentReplacement()
    latents, strength = transform.list_fields(model.codec.config.channels)
    is_held = replaced.is_held
    cell_strength = split_cells(known.strength, model.codec.config.stride).min(axis=(3, 4, 5))
    fields = {
        **plan.fields,
        latents: np.where(is_held[..., None], replaced.encoded, np.float32(0)),
        strength: np.where(is_held, cell_strength, np.float32(0))[..., None],
    }
    sequence = transform if plan.transform is None else TransformSequence(transforms=(plan.transform, transform))
    update = None
    if replaced.is_corrected.any():
        update = PixelReplacement(known=known, is_replaced=replaced.is_corrected, codec=model.codec)
    method = f"{plan.method} and training_free" if plan.method else "training_free"
    return plan._replace(fields=fields, transform=sequence, update=update, resample=request.resample, method=method)


def _find_replaced_latents(
    known: KnownPixels, trained_mask: KnownMask | None, request: Request, model: TaskModel
) -> _ReplacedLatents | None:
    """Return the latents that are replaced; None if there are none."""
    stride = model.codec.config.stride
    rest = known.is_known if trained_mask is None else known.is_known & ~trained_mask
    is_complete = find_known_latents(known.is_known, stride)
    is_held = is_complete & find_any_known(rest, stride)
    if _holds_trained_latents(trained_mask, request, model):
        encoded = model.codec.encode_pixels(known.spread())
        is_held |= is_complete & _is_independent(encoded, known, model)
        # All other latents with known pixels are corrected, those of known pixels that depend on unknown ones, too.
        return _ReplacedLatents(encoded, is_held, find_any_known(known.is_known, stride) & ~is_held)
    is_corrected = find_partly_known_latents(rest, stride)
    if trained_mask is not None and model.backbone.time == "token" and request.method != "trained":
        # Clean tokens are of latents all of whose pixels are known. The model does not get any other known pixels.
        is_corrected |= find_partly_known_latents(trained_mask, stride)
    if not is_held.any() and not is_corrected.any():
        return None
    return _ReplacedLatents(model.codec.encode_pixels(known.spread()), is_held, is_corrected)


def _holds_trained_latents(trained_mask: KnownMask | None, request: Request, model: TaskModel) -> bool:
    """Return whether latents are also replaced that the model is trained to keep: those of a task mix.

    It then keeps them exactly. Models of other projects sample as these do.
    """
    conditioning = model.frame_conditioning
    is_mixed = conditioning is not None and conditioning.has_mask_mix and model.backbone.time != "token"
    return trained_mask is not None and is_mixed and request.method == "auto"


def _is_independent(
    encoded: Float32[np.ndarray, "t h w c"], known: KnownPixels, model: TaskModel
) -> Bool[np.ndarray, "t h w"]:
    """Return True for latents that do not depend on unknown pixels: those that are equal with other values of these."""
    difference = np.abs(encoded - model.codec.encode_pixels(known.blank()))
    return np.max(difference, axis=-1) < _MAX_DIFFERENCE
