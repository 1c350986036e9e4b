"""From requests of clips to requests of latents, and the checks that they pass, which need no weights."""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8

from dit_video.core.errors import UserError
from dit_video.data.latents.codec import LatentCodec
from dit_video.diffusion import TEXT, ClipSize
from dit_video.models.autoencoders import latent_grid
from dit_video.models.conditioning import ClipConditioning, ConditioningLatents, ImageTokens
from dit_video.models.encoders import FrozenTextConfig
from dit_video.sampling import Sampling
from dit_video.sampling.completion import choose_conditioner
from dit_video.sampling.denoiser import list_experts
from dit_video.sampling.packing import IMAGE, RequestSize, SamplingRequest, plan_rows, plan_steps
from dit_video.sampling.pipeline_config import PipelineConfig, make_model_parts, to_grid
from dit_video.sampling.plan import FrameChange
from dit_video.sampling.program import list_fields
from dit_video.sampling.request import ModelParts, Request
from dit_video.sampling.sampler import draw_initial_noise
from dit_video.tokens import Field, Grid
from dit_video.video import Clip
from dit_video.weights.frozen_encoders import FrozenImageEncoder


def check_requests(config: PipelineConfig, requests: Sequence[Request], sampling: Sampling) -> None:
    """Check that a pipeline of a config can sample requests, before its weights are read.

    Args:
      config: Config of the pipeline.
      requests: Requests, each planned with latents of zeros in the place of encoded pictures.
      sampling: Steps, solver and guidance.

    Raises:
      UserError: If `Pipeline.generate_many` would refuse a request.
    """
    check_sampling(config, sampling)
    model = make_empty_model_parts(config)
    tokenizer = (
        None if isinstance(config.model.text_encoder, FrozenTextConfig) else config.model.text_encoder.make_tokenizer()
    )
    for request in requests:
        sized = replace(request, size=config.resolve_size(request))
        # Values of conditioning that previous steps sample are zero here, and models of these may know more of it.
        if config.previous:
            names = [each.field.name for each in config.model.backbone.conditioning]
            sized = select_conditioning(sized, names)
        prepared = prepare_request(config, sized, model, draw_noise=_make_empty_noise)
        grid = prepared.get_token_grid(config.model.backbone.patch)
        size = ClipSize(frames=grid.t, frame_tokens=grid.h * grid.w)
        process = config.model.process.specialize(size)
        times = sampling.make_times(process)
        plan_steps(prepared, process, sampling)
        sampling.guidance.get_params(np.asarray(times.times, np.float32))
        branches = prepared.branches(sampling.guidance.dropped)
        if tokenizer is not None:  # A frozen encoder takes any text.
            texts = tuple(len(tokenizer(prompt)) for prompt, _ in branches)
            plan_rows([RequestSize(grid, texts)], config.model.row_shape, rows=1, is_batched=False)


def check_sampling(config: PipelineConfig, sampling: Sampling) -> None:
    """Check that the model of a pipeline can sample so.

    Raises:
      UserError: If guidance has a scale of a condition that the model lacks, or two experts and the model has one, the
        model lacks layers to skip, or the pipeline has no previous step of a name.
    """
    for name in sampling.previous or ():
        config.get_previous_step(name)
    names = list(get_dropouts(config))
    if unknown := [name for name in sampling.guidance.scales if name not in names]:
        rule = f"the model has no such conditions, but {', '.join(names)}"
        raise UserError(f"guidance of {', '.join(unknown)} is invalid: {rule}. Use a scale of these.")
    if (skip := sampling.guidance.skip_layers) is not None:
        skip.check(config.model.backbone.layers)
    sampling.check_experts(len(list_experts(config.boundary)))


def select_conditioning(request: Request, names: Collection[str]) -> Request:
    """Return a request with the conditioning and strengths of some names alone."""
    conditioning = {name: value for name, value in request.conditioning.items() if name in names}
    strengths = {name: value for name, value in request.strengths.items() if name in names}
    return replace(request, conditioning=conditioning, strengths=strengths)


def get_dropouts(config: PipelineConfig) -> dict[str, float | None]:
    """Return the share of training clips without each condition that guidance may drop, by name; None if unknown."""
    model = config.model
    dropouts: dict[str, float | None] = {TEXT: config.caption_dropout}
    if not {ConditioningLatents, ImageTokens}.isdisjoint(model.backbone.conditioning_kinds):
        dropouts[IMAGE] = None if model.frame_conditioning is None else 1 - model.frame_conditioning.prob
    return dropouts | {each.field.name: each.dropout for each in model.backbone.conditioning}


def _make_empty_noise(_seed: int, latents: Grid, channels: int) -> Float32[np.ndarray, "t h w c"]:
    """Return zeros in the place of a request's noise, for which a program would be compiled for every size."""
    return np.zeros((*latents, channels), np.float32)


def prepare_request(
    config: PipelineConfig,
    request: Request,
    model: ModelParts,
    *,
    draw_noise: Callable[[int, Grid, int], Float32[np.ndarray, "t h w c"]] = draw_initial_noise,
) -> SamplingRequest:
    """Return a request of latents, with the pipeline's negative prompt where the request has none.

    Args:
      config: Config of the pipeline.
      request: Request with its size. Its noise is also that of the plan's `leading_frames`.
      model: The pipeline's model, or one without weights.
      draw_noise: Returns the noise of a seed, for latents of a size and a number of channels.

    Raises:
      UserError: If the model cannot sample the size, the noise does not fit, or the request does not fit its
        conditioner or the model.
    """
    latents = config.model.latent_grid(to_grid(request.size))
    if request.negative is None:
        request = replace(request, negative=config.negative)
    condition = request.conditioner or choose_conditioner(model.conditioner, model.backbone)
    plan = condition(request, model)
    latents = latents._replace(t=latents.t + plan.leading_frames)
    shape = (*latents, model.codec.config.channels)
    noise = request.noise
    initial = draw_noise(request.seed, latents, shape[-1]) if noise is None else np.asarray(noise)
    if initial.shape != shape:
        raise UserError(f"noise for latents of {latents!r} has shape {shape}, not {initial.shape}")
    if not np.isfinite(initial).all():
        raise UserError("the initial noise holds NaN or infinity; draw standard normal noise")
    values = _make_request_fields(model, request.conditioning, request.strengths, latents)
    plan = plan._replace(fields={**values, **plan.fields}, finish=_make_finish(model, request, plan.finish))
    return SamplingRequest(request.prompt, request.negative or "", initial.astype(np.float32), plan, request.seed)


def _make_request_fields(
    model: ModelParts,
    values: Mapping[str, Any],
    strengths: Mapping[str, float | int | Sequence[float | int]],
    latents: Grid,
) -> dict[Field, np.ndarray]:
    """Return a request's values of conditioning by fields and their strengths, for latents of this size.

    Values that the request lacks are zero, and so are those of conditioning that a model without weights cannot open.

    Raises:
      UserError: If the model has no conditioning of a name, or it does not accept a value.
    """
    configs = model.backbone.conditioning
    names = [each.field.name for each in configs]
    if unknown := sorted({*values, *strengths} - set(names)):
        fix = f"use {', '.join(names)}" if names else "leave it out"
        raise UserError(f"conditioning {', '.join(unknown)} is unknown to this model; {fix}")
    fields: dict[Field, np.ndarray] = {}
    for each in configs:
        name, shape = each.field.name, each.field.get_shape(latents)
        strength = np.asarray(strengths.get(name, 1), np.float32)
        if name in strengths and (rule := _check_strength(each, strength)):
            raise UserError(f"strengths={dict(strengths)} is invalid: {name} {rule}.")
        opened = model.conditioning.get(name) if name in values else None
        field = np.zeros(shape, each.field.dtype) if opened is None else opened.from_request(values[name], latents)
        if field.shape != shape:
            raise UserError(
                f"conditioning {name} has the shape {list(field.shape)}, not {list(shape)}; mend from_request"
            )
        fields |= zip(list_fields(each), (field, np.broadcast_to(strength, each.strength_shape)), strict=True)
    return fields


def _make_finish(model: ModelParts, request: Request, finish: FrameChange | None) -> FrameChange | None:
    """Return the change of decoded frames for values of conditioning, before that of the plan; None for no change."""
    changes: list[FrameChange] = [
        functools.partial(model.conditioning[name].finish, value=value)
        for name, value in request.conditioning.items()
        if name in model.conditioning
        and type(model.conditioning[name]).finish is not ClipConditioning.finish
        and request.strengths.get(name, 1) == 1
    ]
    if not changes:
        return finish

    def finish_all(frames: UInt8[np.ndarray, "T H W 3"]) -> UInt8[np.ndarray, "T H W 3"]:
        for change in (*changes, *([] if finish is None else [finish])):
            frames = change(frames)
        return frames

    return finish_all


def _check_strength(config: ClipConditioning, strength: np.ndarray) -> str | None:
    """Return the rule that a strength breaks; None for one that is valid."""
    if config.field.dtype != "float32":
        return "holds integers, which have no strength. Leave it out"
    if strength.shape in ((), config.strength_shape):
        return None
    counts = f" or {', '.join(map(str, config.strength_shape))}" if config.strength_shape else ""
    return f"has one strength{counts}, not {strength.size}. Use one number{counts and ' or as many'}"


class EmptyCodec(LatentCodec):
    """A codec without weights, whose latents are zero."""

    def encode_pixels(self, pixels: np.ndarray) -> Float32[np.ndarray, "t h w c"]:
        grid = latent_grid(Grid(*pixels.shape[:3]), self.config.stride)
        return np.zeros((*grid, self.config.channels), np.float32)

    def reconstruct(self, clip: Clip) -> Clip:
        """Return the clip as it is."""
        return clip


class EmptyImageEncoder:
    """An image encoder without weights, whose tokens are zero."""

    def __init__(self, folder: str):
        self.shape = FrozenImageEncoder(folder).shape

    def __call__(self, frames: np.ndarray) -> Float32[np.ndarray, "T i F"]:
        """Return the tokens of each frame."""
        return np.zeros((len(frames), *self.shape), np.float32)


class EmptyModelParts(ModelParts):
    """Parts of a model that requests use, without weights."""

    @functools.cached_property
    def conditioning(self) -> Mapping[str, ClipConditioning]:
        """Return the conditioning by name, without that which reads files."""
        own = self.backbone.conditioning
        kept = (each for each in own if type(each).open is ClipConditioning.open)
        return {each.field.name: each.use_codec(self.codec) for each in kept}

    @functools.cached_property
    def image_encoder(self) -> Any:
        assert self.image_encoder_folder is not None
        return EmptyImageEncoder(self.image_encoder_folder)


def make_empty_model_parts(config: PipelineConfig) -> EmptyModelParts:
    """Return what requests use of a pipeline, without weights."""
    return EmptyModelParts(**vars(make_model_parts(config, EmptyCodec(config.model.autoencoder, {}))))
