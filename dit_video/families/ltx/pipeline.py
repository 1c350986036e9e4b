"""LTX-Video's pipelines, from diffusers' folders: `LTXPipeline`, `LTXImageToVideoPipeline`, `LTXConditionPipeline`.

Settings that a folder lacks are taken from diffusers' pipelines: clips of 161 frames of 512×704 at 25 frames a second,
50 steps, guidance 3, and the authors' negative prompt. Texts are cut to 128 tokens, or to 256 from version 0.9.5 on.
Text padding is masked in the text encoder, too, as in `encode_prompt` of Lightricks/LTX-Video and in
`LTXConditionPipeline`; the other two classes mask it only in the transformer.

From version 0.9.5 on, images and clips may be at any frame, the model sees kept images with a little noise, positions
count the seconds before a token's first frame, and times are linear-quadratic (`is_095_pipeline`).
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float32, UInt8

from dit_video.core.errors import MissingError, UserError
from dit_video.core.files import read_json
from dit_video.core.rng import key
from dit_video.diffusion import FlowMatchSchedule, LinearQuadraticTimes, UniformTimes
from dit_video.families.autoencoders import read_autoencoder_config
from dit_video.families.family import (
    INDEX,
    Family,
    LoadOptions,
    PipelineParts,
    check_channels,
    check_context_width,
    find_shape,
    make_open_config,
)
from dit_video.families.ltx.transformer import CONDITION_CLASS, LtxDenoiserFormat, is_095_pipeline
from dit_video.models.autoencoders import latent_grid
from dit_video.models.conditioning import FrameConditioning
from dit_video.models.encoders import FrozenTextConfig
from dit_video.sampling.completion import Completion, check_options
from dit_video.sampling.known_pixels import locate_condition
from dit_video.sampling.pipeline_config import PipelineConfig
from dit_video.sampling.plan import ExtraTokens, HeldTokens, SamplingPlan
from dit_video.sampling.request import Condition, Conditioner, ModelParts, Request
from dit_video.tokens import Field, Grid, compute_positions, compute_token_grid, patchify
from dit_video.weights import LoadedScheduler, load_scheduler, read_text_encoder_config
from dit_video.weights.scheduler import SIGMA_SPACINGS

_PREFIX = 2
"""Number of a conditioning clip's first latent frames that become extra tokens."""


@dataclass(frozen=True, kw_only=True)
class KeyframesToVideo(Conditioner):
    """Clips conditioned on images and clips at some frames: the request's `image`, `last_image` and `conditions`.

    What the model was not trained with is kept without training, as by any model of text to video (`Completion`): a
    `video` with `generated` or `strength`, parts of frames, and clips off the stride.
    """

    noise_scale: float = 0.0
    """Noise that the model sees in conditions of strength 1, in units of the squared time."""
    has_keyframes: bool = True
    """Whether images and clips may be at any frame; False for models that were trained only with a first image
    (versions 0.9.0 and 0.9.1)."""

    accepted = Completion.accepted

    def __call__(self, request: Request, model: ModelParts) -> SamplingPlan:
        """Return the plan of a request, which may have no conditions.

        Raises:
          UserError: If a condition's frames are outside the clip, or share latents with another condition; if they do
            not fit the autoencoder's stride, and the method is `trained`; or if the method or the strength is invalid.
        """
        size, stride, channels = request.grid, model.codec.config.stride, model.codec.config.channels
        is_part = any(condition.generated is not None for condition in request.conditions)
        is_early = not self.has_keyframes and bool(request.last_image is not None or request.conditions)
        is_off = request.method == "auto" and any(_find_misfit(each, size, stride) for each in request.conditions)
        if request.video is not None or is_part or is_early or is_off or request.method == "training_free":
            return Completion()(request, replace(model, frame_conditioning=None))
        request.check_pictures(("image", "last_image", "conditions", "method"))
        check_options(request)
        conditions = list(request.conditions)
        if request.last_image is not None:
            conditions.insert(0, Condition(content=request.last_image, frame=-1))
        if request.image is not None:
            conditions.insert(0, Condition(content=request.image))
        if not conditions:
            return SamplingPlan()
        pixels = [_fit(each, size, stride) for each in conditions]
        transform, grid = HeldTokens(noise_scale=self.noise_scale), latent_grid(size, stride)
        fields = {each: np.zeros(each.get_shape(grid), np.float32) for each in transform.list_fields(channels)}
        held, strength = fields.values()
        extras = []
        for condition, (start, frames) in zip(conditions, pixels, strict=True):
            latents, first, prefix = model.codec.encode_pixels(frames), start // stride.t, 0 if start == 0 else _PREFIX
            if prefix:
                extras.append(_Keyframe(latents[:prefix], start, condition.strength))
            placed = slice(first + prefix, first + len(latents))
            if strength[placed].any():
                rule = "other conditions, or image=, have latents of the same frames"
                raise UserError(f"frame={condition.frame} of a condition is invalid: {rule}. Use one of them.")
            held[placed], strength[placed] = latents[prefix:], condition.strength
        extra = _make_extra_tokens(extras, tuple(fields), request.seed, model) if extras else None
        return SamplingPlan(fields, transform=transform, extra=extra)


class _Keyframe(NamedTuple):
    """Latent frames of a condition that are extra tokens."""

    latents: Float32[np.ndarray, "t h w c"]
    start: int
    """Number of their first frame in the clip."""
    strength: float


def _fit(condition: Condition, size: Grid, stride: Grid) -> tuple[int, UInt8[np.ndarray, "T H W 3"]]:
    """Return the first frame of a condition in the clip, and its frames at the clip's height and width."""
    if (misfit := _find_misfit(condition, size, stride)) is not None:
        raise UserError(f"{misfit}, or method='auto'.")
    return locate_condition(condition, size)


def _find_misfit(condition: Condition, size: Grid, stride: Grid) -> str | None:
    """Return the rule of the trained model that a condition breaks, with a fix; None for one that fits."""
    start, frames = locate_condition(condition, size)
    # From the third on, a condition's latents replace the sampled clip's, so they must stand for the same frames.
    if len(frames) > 1 and start % stride.t:
        below = start - start % stride.t
        fix = f"{below} or {below + stride.t}" if below + stride.t + len(frames) <= size.t else str(below)
        rule = f"a clip of {len(frames)} frames begins at a multiple of {stride.t}"
        return f"frame={condition.frame} of a condition is invalid: {rule}. Use {fix}"
    if (len(frames) - 1) % stride.t:
        below = len(frames) - (len(frames) - 1) % stride.t
        return f"a condition of {len(frames)} frames is invalid: it must have 1 + {stride.t}k. Use its first {below}"
    return None


def _make_extra_tokens(
    keyframes: list[_Keyframe], fields: tuple[Field, ...], seed: int, model: ModelParts
) -> ExtraTokens:
    """Return the extra tokens of keyframes: their noise, drawn from the request's seed, positions and values."""
    patch, stride, tokens, positions, strengths = model.backbone.patch, model.codec.config.stride, [], [], []
    for latents, start, strength in keyframes:
        tokens.append(patchify(latents, patch))
        grid = compute_token_grid(Grid(*latents.shape[:3]), patch)
        each = compute_positions(grid, step=(model.token_dt, 1.0, 1.0), lead=model.token_lead)
        positions.append(each + np.asarray([start / (stride.t * patch.t) * model.token_dt, 0, 0], np.float32))
        strengths.append(np.full((grid.volume, patch.volume), strength, np.float32))
    values = np.concatenate(tokens)
    noise = np.asarray(jax.random.normal(key(seed, "conditions"), values.shape))
    held, strength_field = fields
    return ExtraTokens(noise, np.concatenate(positions), {held: values, strength_field: np.concatenate(strengths)})


PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
"""Subfolders of a pipeline that are read."""
CLASSES = ("LTXPipeline", "LTXImageToVideoPipeline", CONDITION_CLASS)
DENOISER = LtxDenoiserFormat()
_STEPS, _GUIDANCE, _SIZE, _FPS = 50, 3.0, Grid(161, 512, 704), 25.0
_MAX_TOKENS, _CONDITION_MAX_TOKENS, _NOISE_SCALE = 128, 256, 0.15
_STRIDE = Grid(8, 32, 32)
_SETTINGS_OF_TIMES = {
    "use_dynamic_shifting": False,
    "shift": 1.0,
    "shift_terminal": None,
    **dict.fromkeys(SIGMA_SPACINGS, False),
}
"""Scheduler settings that change its times, with the values that leave the times unchanged."""
NEGATIVE = "worst quality, inconsistent motion, blurry, jittery, distorted"
"""Negative prompt, the default of `inference.py` in Lightricks/LTX-Video."""


class LtxFamily(Family):
    """LTX-Video 0.9 (arXiv 2501.00103): text, images and clips at any frame to video, in diffusers' folders."""

    name = "ltx"
    denoiser = DENOISER
    parts = PARTS
    pipeline_classes = CLASSES

    def recognize(self, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
        query = find_shape(shapes, r"transformer_blocks\.0\.attn2\.(q_norm|norm_q)\.weight")
        return None if query is None else f"Lightricks/LTX-Video-0.9.{'7-dev' if query[0] == 4096 else '5'}"

    def make_config(self, folder: Path, options: LoadOptions) -> PipelineConfig:
        parts = read_parts(folder, text_encoder=options.text_encoder)
        return make_open_config(folder, parts, options, steps=_STEPS, guidance=parts.guidance, negative=NEGATIVE)

    def read_parts(self, folder: Path) -> PipelineParts:
        return read_parts(folder)


def read_parts(folder: Path, *, text_encoder: str | os.PathLike | None = None) -> PipelineParts:
    """Read the configs of a folder of diffusers, and check that its parts fit each other.

    Raises:
      MissingError: If the folder does not exist, or lacks parts; the message names all of them.
      UserError: If the class of the pipeline or of a model is unknown, a setting is not supported, or the parts do not
        fit.
    """
    _check_class(folder)
    if missing := [part for part in PARTS if not (folder / part).is_dir()]:
        raise MissingError(f"{folder} lacks the folders {', '.join(missing)}; copy or download them too")
    # Configs outlive the process and its working directory.
    encoder = (folder / "text_encoder" if text_encoder is None else Path(text_encoder)).absolute()
    width = read_text_encoder_config(encoder).width
    backbone, autoencoder = DENOISER.read_folder_config(folder / "transformer"), read_autoencoder_config(folder / "vae")
    check_channels(folder, backbone, autoencoder)
    check_context_width(encoder, width, backbone)
    if autoencoder.stride != _STRIDE:
        rule = f"the transformer was trained with strides of {tuple(_STRIDE)}, the vae has {tuple(autoencoder.stride)}"
        raise UserError(f"{folder} is invalid: {rule}. Use the autoencoder that the transformer was trained with")
    is_095 = is_095_pipeline(folder)
    max_tokens = _CONDITION_MAX_TOKENS if is_095 else _MAX_TOKENS
    return PipelineParts(
        denoiser=backbone,
        autoencoder=autoencoder,
        text=FrozenTextConfig(folder=os.fspath(encoder), width=width, max_tokens=max_tokens),
        schedule=_read_schedule(folder, is_095=is_095),
        size=_SIZE,
        fps=_FPS,
        guidance=_GUIDANCE,
        frame_conditioning=FrameConditioning(),
        conditioner=KeyframesToVideo(noise_scale=_NOISE_SCALE if is_095 else 0.0, has_keyframes=is_095),
    )


def _read_schedule(folder: Path, *, is_095: bool) -> LoadedScheduler:
    """Return the folder's scheduler at the times that diffusers' pipelines pass to it.

    Raises:
      UserError: If the scheduler has another class, or changes the times of a version that was published with fixed
        ones.
    """
    schedule, file = load_scheduler(folder / "scheduler"), folder / "scheduler" / "scheduler_config.json"
    own, document = schedule.time_schedule, read_json(file)
    if not isinstance(own, FlowMatchSchedule):
        rule = "pipelines of LTX-Video pass times of their own to a FlowMatchEulerDiscreteScheduler"
        raise UserError(f"{file}: _class_name={document['_class_name']} is invalid: {rule}. Use that class.")
    if not is_095:
        return schedule._replace(time_schedule=UniformTimes(terminal_time=own.terminal_time, spacing=own.spacing))
    # diffusers then changes the times of the steps, but not the times that the model gets.
    for name, kept in _SETTINGS_OF_TIMES.items():
        if (value := document.get(name) or kept) != kept:
            rule = "times are linear-quadratic from version 0.9.5 on"
            raise UserError(f"{file}: {name}={value} is invalid: {rule}. Use {name}={kept}.")
    return schedule._replace(time_schedule=LinearQuadraticTimes())


def _check_class(folder: Path) -> None:
    """Check the class of `model_index.json`.

    Raises:
      MissingError: If the folder does not exist.
      UserError: If the pipeline's class is unknown.
    """
    index = read_json(folder / INDEX)
    name = index.get("_class_name") if isinstance(index, dict) else None
    if name not in CLASSES:
        rule = f"a pipeline of LTX-Video is a {' or '.join(CLASSES)}"
        raise UserError(f"{folder / INDEX}: _class_name={name} is invalid: {rule}. Use another folder.")
