"""LTX-Video's pipelines, from diffusers' folders: `LTXPipeline`, `LTXImageToVideoPipeline`, `LTXConditionPipeline`.

Settings that are not in a folder are those of diffusers' pipelines: clips of 161 frames of 512×704 at 25 frames a
second, 50 steps, guidance 3, and the authors' negative prompt; texts are cut to 128 tokens, from version 0.9.5 on to
256. Padding of texts is masked in the text encoder, too, as `encode_prompt` of Lightricks/LTX-Video and
`LTXConditionPipeline` do; the other two classes mask it in the transformer alone.

From version 0.9.5 on positions count the seconds before a token's first frame, times are linear-quadratic, and images
that are kept are seen with a little noise (`is_095_pipeline`).
"""

import os
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp

from dit_video.conditioning import FrameConditioning
from dit_video.core.errors import MissingError, UserError
from dit_video.core.files import read_json
from dit_video.diffusion import FlowMatchSchedule, LinearQuadraticTimes, RectifiedFlow, UniformTimes
from dit_video.families.autoencoders import load_placed_autoencoder, read_autoencoder_config
from dit_video.families.family import INDEX, Family, LoadOptions, PipelineParts
from dit_video.families.ltx.task import KeyframesToVideo
from dit_video.families.ltx.transformer import CONDITION_CLASS, LtxDenoiserFormat, is_095_pipeline
from dit_video.families.weight_checks import check_pipeline_weights
from dit_video.generation import Sampling
from dit_video.pipelines.config import PipelineConfig
from dit_video.pipelines.pipeline import Pipeline
from dit_video.text import FrozenTextConfig
from dit_video.tokens import Grid
from dit_video.weights import LoadedScheduler, load_scheduler, read_text_encoder_config

PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
"""Subfolders of a pipeline that are read."""
CLASSES = ("LTXPipeline", "LTXImageToVideoPipeline", CONDITION_CLASS)
DENOISER = LtxDenoiserFormat()
_STEPS, _GUIDANCE, _SIZE, _FPS = 50, 3.0, Grid(161, 512, 704), 25.0
_MAX_TOKENS, _CONDITION_MAX_TOKENS, _NOISE_SCALE = 128, 256, 0.15
_STRIDE = Grid(8, 32, 32)
NEGATIVE = "worst quality, inconsistent motion, blurry, jittery, distorted"
"""Negative prompt, the default of `inference.py` in Lightricks/LTX-Video."""


class LtxFamily(Family):
    """LTX-Video 0.9 (arXiv 2501.00103): text, images and clips at any frame to video, in diffusers' folders."""

    name = "ltx"
    denoiser = DENOISER
    parts = PARTS
    pipeline_classes = CLASSES

    def load_pipeline(self, folder: Path, options: LoadOptions) -> Pipeline:
        """Load a pipeline from a folder of diffusers.

        Raises:
          MissingError: the folder does not exist, or lacks parts, all of which are named.
          UserError: a pipeline or a model of an unknown class, unsupported settings, or weights that do not fit.
        """
        parts = read_parts(folder, text_encoder=options.text_encoder)
        check_pipeline_weights(folder, parts, DENOISER)
        _, params = DENOISER.load(
            folder / "transformer",
            kernel_dtype=jnp.dtype(options.dtype),
            place=lambda path, parameter: options.place(f"backbone/{path}", parameter),
        )
        _, autoencoder = load_placed_autoencoder(folder, parts.denoiser.channels, options.place)
        parameters = {"autoencoder": autoencoder, "denoiser": {"backbone": params, "text": {}}}
        return Pipeline(
            _make_config(folder, parts, options),
            **parameters,
            get_lora_modules=DENOISER.get_lora_modules,
            mesh=options.mesh,
            offload=options.offload,
        )

    def make_config(self, folder: Path, options: LoadOptions) -> PipelineConfig:
        return _make_config(folder, read_parts(folder, text_encoder=options.text_encoder), options)

    def read_parts(self, folder: Path) -> PipelineParts:
        return read_parts(folder)


def _make_config(folder: Path, parts: PipelineParts, options: LoadOptions) -> PipelineConfig:
    schedule = parts.schedule
    return PipelineConfig(
        autoencoder=parts.autoencoder,
        backbone=parts.denoiser.replace(dtype=options.dtype),
        text=replace(parts.text, dtype=options.text_dtype or options.dtype),
        process=schedule.process,
        prediction=schedule.prediction,
        layout=None,
        batch=1,
        sampling=Sampling(
            steps=_STEPS, guidance=parts.guidance, solver=schedule.solver, time_schedule=schedule.time_schedule
        ),
        fps=parts.fps,
        size=parts.size,
        negative=NEGATIVE,
        frame_conditioning=parts.frame_conditioning,
        task=parts.task,
        provenance={"loaded from": os.fspath(folder), "class": _read_class(folder)},
    )


def read_parts(folder: Path, *, text_encoder: str | os.PathLike | None = None) -> PipelineParts:
    """Read the configs of a folder of diffusers, and check that its parts fit each other.

    Raises:
      MissingError: the folder does not exist, or lacks parts, all of which are named.
      UserError: a pipeline or a model of an unknown class, unsupported settings, or parts that do not fit.
    """
    _read_class(folder)
    if missing := [part for part in PARTS if not (folder / part).is_dir()]:
        raise MissingError(f"{folder} lacks the folders {', '.join(missing)}; copy or download them too")
    encoder = folder / "text_encoder" if text_encoder is None else Path(text_encoder)
    width = read_text_encoder_config(encoder).width
    backbone, autoencoder = DENOISER.read_folder_config(folder / "transformer"), read_autoencoder_config(folder / "vae")
    if width != backbone.context_width:
        raise UserError(f"{encoder} makes embeddings of width {width}, the transformer reads {backbone.context_width}")
    if autoencoder.stride != _STRIDE:
        stride = tuple(autoencoder.stride)
        raise UserError(f"{folder}: the transformer was trained with strides of {tuple(_STRIDE)}, the vae has {stride}")
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
        task=KeyframesToVideo(noise_scale=_NOISE_SCALE if is_095 else 0.0),
    )


def _read_schedule(folder: Path, *, is_095: bool) -> LoadedScheduler:
    """Return the folder's scheduler at the times at which diffusers' pipelines use it."""
    schedule = load_scheduler(folder / "scheduler")
    if not is_095:
        if not isinstance(schedule.time_schedule, FlowMatchSchedule):
            return schedule
        return schedule._replace(time_schedule=UniformTimes(terminal_time=schedule.time_schedule.terminal_time))
    if schedule.process != RectifiedFlow():
        file = folder / "scheduler" / "scheduler_config.json"
        raise UserError(f"{file} shifts times, which are linear-quadratic in this version; use shift=1")
    return schedule._replace(time_schedule=LinearQuadraticTimes())


def _read_class(folder: Path) -> str:
    """Return the class of `model_index.json`.

    Raises:
      MissingError: the folder does not exist.
      UserError: a pipeline of an unknown class.
    """
    index = read_json(folder / INDEX)
    name = index.get("_class_name") if isinstance(index, dict) else None
    if name not in CLASSES:
        raise UserError(f"{folder} holds a pipeline of class {name}, not a {' or '.join(CLASSES)}; use another folder")
    return str(name)
