"""Completion of clips: text to video, images to video, extension, interpolation, inpainting, outpainting and editing.

All of them are one mechanism. A request has known pixels, those of images, clips and masks, and sampling completes
them: as the model was trained (`FrameConditioning`), or without training.

A trained model either reads a mask and latents next to the noisy latents: those of the first frame, with zeros for the
others, or, as Wan's models, those of the clip in which all unknown pixels are grey; some models also read an image
encoder's tokens (2.1, and 2.2 A14B). Or the latents of known pixels are in the clip itself, clean, at time 0 (2.2
TI2V-5B).

Without training, known parts of a sample are replaced after every step by their own noisy latents. Any model completes
clips in this way (RePaint, arXiv 2201.09865, and before it arXiv 2011.13456, appendix I.2). The model sees them clean:
then what is new goes on from them much better than from noise.
"""

import warnings
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, UInt8

from dit_video.core.errors import UserError
from dit_video.data.latents.codec import LatentCodec
from dit_video.diffusion import Process
from dit_video.models.autoencoders import latent_grid
from dit_video.models.backbones.protocol import BackboneConfig
from dit_video.models.conditioning import (
    COND_LATENTS,
    IMAGE_TOKENS,
    ControlClip,
    IsKnown,
    find_any_known,
    find_known_latents,
    find_partly_known_latents,
    fold_mask,
    split_cells,
)
from dit_video.models.conditioning.masks import find_known_frames
from dit_video.sampling.known_pixels import KnownPixels, collect_known_pixels, fit_clip
from dit_video.sampling.plan import (
    HELD_LATENTS,
    HELD_STRENGTH,
    TIME_TOLERANCE,
    BlockEnd,
    CleanTokens,
    LatentUpdate,
    SamplingPlan,
    StepInputs,
    StepTransform,
    TransformSequence,
    make_latent_fields,
)
from dit_video.sampling.request import OPTIONS, Conditioner, ModelParts, Request
from dit_video.tokens import Field, Grid, PackedBatch
from dit_video.video import Clip

IMAGE_IS_NEEDED = (
    "this model needs an image; give image=, a clip of one frame or pixels [H W 3] (of a task "
    "conditions=[Condition(content=image)]), or a mask that keeps the first frame"
)
_MAX_DIFFERENCE = 0.05
"""Largest difference of latents that counts as rounding; their standard deviation is about 1."""


@dataclass(frozen=True, kw_only=True)
class Completion(Conditioner):
    """Clips that keep the known pixels of a request, or that start from its `video`; without them, text to video."""

    accepted: ClassVar[tuple[str, ...]] = ("image", "last_image", "video", "generated", "conditions", *OPTIONS)

    def __call__(self, request: Request, model: ModelParts) -> SamplingPlan:
        """Return the plan of a request.

        Raises:
          UserError: If pictures, the strength or the method do not fit the request or the model.
        """
        request.check_pictures(self.accepted)
        check_options(request)
        if request.grid.t == 1 and model.frame_conditioning is not None and model.frame_conditioning.is_required:
            fix = f"Use {1 + model.codec.config.stride.t} frames or more, or a model of text to video"
            raise UserError(f"a clip of one frame is invalid: this model animates an image. {fix}")
        known = collect_known_pixels(request)
        trained_part = None if known is None else _choose_trained_part(known, request, model)
        trained = None if known is None or trained_part is None else known.select(trained_part)
        plan = plan_trained(trained, request.grid, model)._replace(method="" if trained is None else "trained")
        if known is not None:
            plan = _add_replacement(plan, known, trained_part, request, model)
        start = encode_start(request, model)
        return plan if start is None else plan._replace(start=start, start_time=float(request.strength or 1.0))


@dataclass(frozen=True, kw_only=True)
class ControlledCompletion(Completion):
    """Completion of clips that follow the request's `control`, for a model with a `ControlClip`."""

    accepted = (*Completion.accepted, "control")

    def __call__(self, request: Request, model: ModelParts) -> SamplingPlan:
        """Return the plan of a request; raises like `Completion`, and if the control does not fit the clip."""
        plan = super().__call__(replace(request, control=None), model)
        if request.control is None:
            return plan
        control = model.conditioning["control"]
        latents = latent_grid(request.grid, model.codec.config.stride)
        return plan._replace(fields={**plan.fields, control.field: control.from_request(request.control, latents)})


def choose_conditioner(conditioner: Conditioner | None, backbone: BackboneConfig) -> Conditioner:
    """Return a model's conditioner; by default completion, with control if the backbone reads such a clip."""
    if conditioner is not None:
        return conditioner
    has_control = any(isinstance(each, ControlClip) for each in backbone.conditioning)
    return ControlledCompletion() if has_control else Completion()


def encode_start(request: Request, model: ModelParts) -> Float32[np.ndarray, "t h w c"] | None:
    """Return the latents of a request's video that sampling starts from; None if it starts from noise alone.

    Raises:
      UserError: If the video is shorter than the clip.
    """
    if request.video is None or request.strength in (None, 1):
        return None
    return model.codec.encode_pixels(fit_clip("video", request.video, request.grid))


def check_options(request: Request) -> None:
    """Check how the pictures of a request are kept.

    Raises:
      UserError: If the strength, the method or the number of repeated steps is invalid.
    """
    if request.video is not None and request.generated is None and request.strength is None:
        raise UserError("video= is invalid alone: say what of it changes. Use generated=, or strength= for all of it")
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


def _choose_trained_part(known: KnownPixels, request: Request, model: ModelParts) -> IsKnown | None:
    """Return the known pixels that are given to the model as in its training; None for none.

    Raises:
      UserError: If the model is not trained for them, and the request does not allow another method.
    """
    conditioning = model.frame_conditioning
    needs_image = conditioning is not None and conditioning.is_required
    part = find_trained_part(known, model)
    if request.method == "training_free":
        if needs_image:
            rule = "this model reads a first image in any case"
            raise UserError(f"method='training_free' is invalid: {rule}. Use method='auto'")
        return None
    is_complete = part is not None and bool((part == known.is_known).all(axis=(0, 1, 2)))
    if part is None and needs_image:
        raise UserError(IMAGE_IS_NEEDED)
    if not is_complete:
        rule = "this model was not trained for what is known of the clip"
        if request.method == "trained":
            raise UserError(f"method='trained' is invalid: {rule}. Use method='auto', or a model that was")
        if request.method == "auto":
            warnings.warn(f"{rule}: it is kept without training, by replacement of latents", stacklevel=2)
    return part


class _ReplacedLatents(NamedTuple):
    """Latents that sampling replaces, in one of two ways."""

    encoded: Float32[np.ndarray, "t h w c"]
    """Latents of the clip, whose unknown pixels are as the nearest known ones."""
    is_held: Bool[np.ndarray, "t h w"]
    """True for latents of known pixels, which `LatentReplacement` holds."""
    is_corrected: Bool[np.ndarray, "t h w"]
    """True for latents that also stand for, or depend on, unknown pixels: `PixelReplacement` corrects them."""


def _add_replacement(
    plan: SamplingPlan, known: KnownPixels, trained_part: IsKnown | None, request: Request, model: ModelParts
) -> SamplingPlan:
    """Return the plan with the replacement of what the model is not trained to keep."""
    replaced = _find_replaced_latents(known, trained_part, request, model)
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
    return plan._replace(
        fields=fields,
        transform=sequence,
        update=update,
        resample=request.resample,
        finish=known.restore,
        method=method,
    )


def _find_replaced_latents(
    known: KnownPixels, trained_part: IsKnown | None, request: Request, model: ModelParts
) -> _ReplacedLatents | None:
    """Return the latents that are replaced; None if there are none."""
    stride = model.codec.config.stride
    rest = known.is_known if trained_part is None else known.is_known & ~trained_part
    is_complete = find_known_latents(known.is_known, stride)
    is_held = is_complete & find_any_known(rest, stride)
    if _holds_trained_latents(trained_part, request, model):
        encoded = model.codec.encode_pixels(known.spread())
        is_held |= is_complete & _is_independent(encoded, known, model)
        # All other latents with known pixels are corrected, those of known pixels that depend on unknown ones, too.
        return _ReplacedLatents(encoded, is_held, find_any_known(known.is_known, stride) & ~is_held)
    is_corrected = find_partly_known_latents(rest, stride)
    if trained_part is not None and model.backbone.time == "token" and request.method != "trained":
        # Clean tokens are of latents all of whose pixels are known. The model does not get any other known pixels.
        is_corrected |= find_partly_known_latents(trained_part, stride)
    if not is_held.any() and not is_corrected.any():
        return None
    return _ReplacedLatents(model.codec.encode_pixels(known.spread()), is_held, is_corrected)


def _holds_trained_latents(trained_part: IsKnown | None, request: Request, model: ModelParts) -> bool:
    """Return whether latents are also replaced that the model is trained to keep: those of a task mix.

    It then keeps them exactly. Models of other projects sample as these do.
    """
    conditioning = model.frame_conditioning
    is_mixed = conditioning is not None and conditioning.has_mask_mix and model.backbone.time != "token"
    return trained_part is not None and is_mixed and request.method == "auto"


def _is_independent(
    encoded: Float32[np.ndarray, "t h w c"], known: KnownPixels, model: ModelParts
) -> Bool[np.ndarray, "t h w"]:
    """Return True for latents that do not depend on unknown pixels: those that are equal with other values of these."""
    difference = np.abs(encoded - model.codec.encode_pixels(known.blank()))
    return np.max(difference, axis=-1) < _MAX_DIFFERENCE


def find_trained_part(known: KnownPixels, model: ModelParts) -> IsKnown | None:
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
    accepted = (each for each in candidates if each.any() and conditioning.accepts(~each))
    if model.image_encoder_folder is not None and model.backbone.image_positions is None:
        # Its image tokens are those of a first frame alone.
        return first if is_kept[0].all() and len(is_kept) > 1 else None
    return next(accepted, None)


def plan_trained(known: KnownPixels | None, size: Grid, model: ModelParts) -> SamplingPlan:
    """Return the plan of a clip with known pixels as the model is trained with, or without any.

    Raises:
      UserError: If the model needs an image and there is none, or it is trained with other frames.
    """
    backbone, conditioning = model.backbone, model.frame_conditioning
    if conditioning is None:
        return SamplingPlan()
    if known is None and conditioning.is_required:
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


def _plan_clean_tokens(known: KnownPixels | None, size: Grid, model: ModelParts) -> SamplingPlan:
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


def _make_cond_latents(known: KnownPixels | None, size: Grid, model: ModelParts) -> Float32[np.ndarray, "t h w g"]:
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


def _encode_frame(frame: UInt8[np.ndarray, "H W 3"], model: ModelParts) -> Float32[np.ndarray, "1 h w c"]:
    return model.codec.encode(Clip(frame[None], fps=1.0))


def _encode_tokens(known: KnownPixels | None, model: ModelParts) -> Float32[np.ndarray, "i F"]:
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


@dataclass(frozen=True, kw_only=True)
class LatentReplacement(StepTransform):
    """Known latents, which are noised with the sample's initial noise to its time after every step.

    Latents are released at the time `1 - strength`, and are denoised with the others from then on. Until then the model
    sees them as at that time, clean at a strength of 1, and has that time for them if it has one per token.
    """

    def list_fields(self, channels: int) -> tuple[Field, ...]:
        return make_latent_fields(HELD_LATENTS, HELD_STRENGTH, channels=channels)

    def change_input(
        self, noisy: Float[Array, "B N p"], times: Float[Array, "B N"], rows: PackedBatch, process: Process
    ) -> tuple[Float[Array, "B N p"], Float[Array, "B N"]]:
        """Show the known latents that are not released yet as they will be then."""
        release = self._get_release_times(rows)
        known = process.input_scale(release) * self._add_noise(rows, release, process)
        times = jnp.minimum(times, release.max(axis=-1))
        return jnp.where(self._is_held(release, times[..., None]), known, noisy), times

    def change_sample(self, sample: Float[Array, "B N p"], inputs: StepInputs) -> Float[Array, "B N p"]:
        """Replace the known latents that are not released yet."""
        known = self._add_noise(inputs.rows, inputs.time, inputs.process)
        return jnp.where(self._is_held(self._get_release_times(inputs.rows), inputs.time), known, sample)

    @staticmethod
    def _get_release_times(rows: PackedBatch) -> Float[Array, "B N p"]:
        """Return the time at which each value is released; 1 for those that are not known."""
        strength = jnp.asarray(rows.fields[HELD_STRENGTH])
        # A patch has one strength for each position, and the latents' channels for each.
        return 1 - jnp.repeat(strength, rows.fields[HELD_LATENTS].shape[-1] // strength.shape[-1], axis=-1)

    @staticmethod
    def _is_held(release: Float[Array, "B N p"], time: Float[Array, "*times"]) -> Bool[Array, "B N p"]:
        return (release < 1) & (time >= release - TIME_TOLERANCE)

    @staticmethod
    def _add_noise(rows: PackedBatch, time: Float[Array, "*times"], process: Process) -> Float[Array, "B N p"]:
        """Return the known latents with the sample's initial noise."""
        return process.add_noise(jnp.asarray(rows.fields[HELD_LATENTS]), jnp.asarray(rows.tokens), time)


@dataclass(frozen=True, kw_only=True, eq=False)
class PixelReplacement(LatentUpdate):
    """Known pixels of latents that also stand for, or depend on, unknown ones.

    They are keyframes that are off the temporal stride, and pixels at the border of a region.

    The data that a block of steps leads to are decoded, the known pixels are put in place, and what is encoded of the
    result takes the place of these latents, with the sample's own noise.
    """

    known: KnownPixels
    is_replaced: Bool[np.ndarray, "t h w"]
    """True for the latents that are replaced."""
    codec: LatentCodec

    def __call__(self, latents: Float32[np.ndarray, "t h w c"], end: BlockEnd) -> Float32[np.ndarray, "t h w c"]:
        """Return the latents with those of the known frames, which a strength releases as for `LatentReplacement`."""
        is_kept = self.known.is_known & (end.time >= 1 - self.known.strength - TIME_TOLERANCE)
        if not is_kept.any():
            return latents
        decoded = self.codec.decode(end.data, fps=1.0).frames
        pixels = np.where(is_kept[..., None], self.known.frames, decoded)
        replaced = end.combine(self.codec.encode_pixels(pixels), end.noise)
        return np.where(self.is_replaced[..., None], replaced, latents)
