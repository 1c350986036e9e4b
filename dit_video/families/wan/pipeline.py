"""Wan's pipelines, from diffusers' folders: `WanPipeline` and `WanImageToVideoPipeline`, 2.1 and 2.2.

Defaults of sampling are the authors' (`families.wan.defaults`), at 16 frames a second (24 for the model with a time per
token, TI2V-5B). As in diffusers' pipeline, texts are cleaned and cut to 512 tokens, and the denoiser pads them with
zeros and attends to the padding.
"""

import functools
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import jax.numpy as jnp

from dit_video.backbones.wan import WanDitConfig
from dit_video.conditioning import FrameConditioning
from dit_video.core.errors import MissingError, UserError
from dit_video.core.files import read_json
from dit_video.diffusion import RectifiedFlow
from dit_video.families.autoencoders import load_placed_autoencoder, read_autoencoder_config
from dit_video.families.family import (
    DEFAULT_DTYPE,
    INDEX,
    Dtype,
    Family,
    LoadOptions,
    PipelineParts,
    read_pipeline_class,
)
from dit_video.families.wan.defaults import find_defaults
from dit_video.families.wan.transformer import WanDenoiserFormat
from dit_video.families.weight_checks import check_pipeline_weights
from dit_video.generation import Sampling
from dit_video.pipelines.config import PipelineConfig
from dit_video.pipelines.pipeline import Pipeline
from dit_video.text import FrozenTextConfig
from dit_video.tokens import Grid
from dit_video.weights import load_scheduler, read_clip_vision_config, read_text_encoder_config
from dit_video.weights.parameter import Placement

_SECOND_EXPERT, _IMAGE_PARTS = "transformer_2", ("image_encoder", "image_processor")
_REQUIRED_PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
PARTS = (*_REQUIRED_PARTS, _SECOND_EXPERT, *_IMAGE_PARTS)
"""Subfolders of a pipeline that are read."""
CLASSES = ("WanPipeline", "WanImageToVideoPipeline")
DENOISER = WanDenoiserFormat()
_SIZE, _FPS = Grid(81, 480, 832), 16.0
_TOKEN_TIME_SIZE, _TOKEN_TIME_FPS = Grid(121, 704, 1280), 24.0


class WanFamily(Family):
    """Wan 2.1 and 2.2 (arXiv 2503.20314): text to video and image to video, in diffusers' folders."""

    name = "wan"
    denoiser: ClassVar[WanDenoiserFormat] = DENOISER
    parts = PARTS
    pipeline_classes: ClassVar[tuple[str, ...]] = CLASSES

    def load_pipeline(self, folder: Path, options: LoadOptions) -> Pipeline:
        """Load a pipeline from a folder of diffusers; solver and time schedule are those of its scheduler.

        Parameters are read one at a time, of a stack one layer at a time, and placed by `place`.

        Args:
          folder: holds `model_index.json` and the parts that it names.
          options: dtypes, devices and host memory. The text encoder is read at the first prompt.

        Raises:
          MissingError: the folder does not exist, or lacks parts, all of which are named.
          UserError: a pipeline or a model of an unknown class, unsupported settings, or weights that do not fit.
        """
        parts = self.read_parts(folder, text_encoder=options.text_encoder)
        check_pipeline_weights(folder, parts, self.denoiser)
        read = functools.partial(_read_denoiser, self.denoiser, dtype=options.dtype, place=options.place)
        backbone, params = read(folder / "transformer", "backbone")
        denoiser = {"backbone": params, "text": {}}
        if parts.boundary is not None:
            second, denoiser["low_noise"] = read(folder / _SECOND_EXPERT, "low_noise")
            if second != backbone:
                raise UserError(
                    f"{folder} has two experts of different shapes, {backbone} and {second}; they must be equal"
                )
        _, autoencoder_params = load_placed_autoencoder(folder, backbone.channels, options.place)
        return Pipeline(
            make_pipeline_config(folder, parts, dtype=options.dtype, text_dtype=options.text_dtype),
            autoencoder=autoencoder_params,
            denoiser=denoiser,
            get_lora_modules=self.denoiser.get_lora_modules,
            mesh=options.mesh,
            offload=options.offload,
        )

    def make_config(self, folder: Path, options: LoadOptions) -> PipelineConfig:
        parts = self.read_parts(folder, text_encoder=options.text_encoder)
        return make_pipeline_config(folder, parts, dtype=options.dtype, text_dtype=options.text_dtype)

    def read_parts(self, folder: Path, *, text_encoder: str | os.PathLike | None = None) -> PipelineParts:
        return _read_parts(folder, self.denoiser, self.pipeline_classes, text_encoder)


def make_pipeline_config(
    folder: Path, parts: PipelineParts, *, dtype: Dtype = DEFAULT_DTYPE, text_dtype: Dtype | None = None
) -> PipelineConfig:
    """Return the config of a folder's pipeline, with the authors' defaults, from the configs in the folder.

    `text_dtype` is the text encoder's, by default `dtype`.
    """
    schedule, experts = parts.schedule, 1 if parts.boundary is None else 2
    process = schedule.process
    assert isinstance(parts.denoiser, WanDitConfig)
    flow_shift = process.shift if isinstance(process, RectifiedFlow) else 1.0
    defaults = find_defaults(parts.denoiser, experts=experts, flow_shift=flow_shift)
    if defaults.shift is not None and isinstance(process, RectifiedFlow):
        process = replace(process, shift=defaults.shift)
    return PipelineConfig(
        autoencoder=parts.autoencoder,
        backbone=replace(parts.denoiser, dtype=dtype),
        text=replace(parts.text, dtype=text_dtype or dtype),
        process=process,
        prediction=schedule.prediction,
        layout=None,
        batch=1,
        sampling=Sampling(
            steps=defaults.steps,
            guidance=defaults.guidance,
            solver=schedule.solver,
            time_schedule=schedule.time_schedule,
        ),
        fps=parts.fps,
        size=defaults.size,
        negative=defaults.negative,
        boundary=parts.boundary,
        frame_conditioning=parts.frame_conditioning,
        image_encoder=parts.image_encoder,
        task=parts.task,
        provenance={"loaded from": os.fspath(folder), "class": str(read_pipeline_class(folder))},
    )


def _read_parts(
    folder: Path, denoiser: WanDenoiserFormat, classes: tuple[str, ...], text_encoder: str | os.PathLike | None
) -> PipelineParts:
    """Read the configs of a folder of diffusers, and check that its parts fit each other.

    Raises:
      MissingError: the folder does not exist, or lacks parts, all of which are named.
      UserError: a pipeline or a model of an unknown class, unsupported settings, or parts that do not fit.
    """
    index = _read_index(folder, classes)
    schedule = load_scheduler(folder / "scheduler")
    encoder = folder / "text_encoder" if text_encoder is None else Path(text_encoder)
    width = read_text_encoder_config(encoder).width
    backbone = denoiser.read_folder_config(folder / "transformer")
    if width != backbone.context_width:
        raise UserError(f"{encoder} makes embeddings of width {width}, the transformer reads {backbone.context_width}")
    images = folder / "image_encoder" if backbone.image_width is not None else None
    if images is not None and (image_width := read_clip_vision_config(images).width) != backbone.image_width:
        raise UserError(f"{images} makes tokens of width {image_width}, the transformer reads {backbone.image_width}")
    return PipelineParts(
        denoiser=backbone,
        autoencoder=read_autoencoder_config(folder / "vae"),
        text=FrozenTextConfig(folder=os.fspath(encoder), width=width, max_tokens=backbone.text_length, cleaned=True),
        schedule=schedule,
        size=_TOKEN_TIME_SIZE if backbone.time == "token" else _SIZE,
        fps=_TOKEN_TIME_FPS if backbone.time == "token" else _FPS,
        boundary=index.get("boundary_ratio") if _has_part(index, _SECOND_EXPERT) else None,
        frame_conditioning=_get_frame_conditioning(backbone),
        image_encoder=None if images is None else os.fspath(images),
    )


def _get_frame_conditioning(backbone: WanDitConfig) -> FrameConditioning | None:
    """Return the conditioning that the original models were trained with: I2V always had an image, TI2V-5B at times."""
    if backbone.cond_channels:
        return FrameConditioning(prob=1.0, rest="grey")
    return FrameConditioning() if backbone.time == "token" else None


def _read_index(folder: Path, classes: tuple[str, ...]) -> dict[str, Any]:
    """Return `model_index.json` after checking that all its parts exist; two experts have a `boundary_ratio` in it.

    Raises:
      MissingError: the folder does not exist, or lacks parts.
      UserError: a pipeline of an unknown class, or two experts without a boundary.
    """
    index = read_json(folder / INDEX)
    name = index.get("_class_name") if isinstance(index, dict) else None
    if name not in classes:
        raise UserError(f"{folder} holds a pipeline of class {name}, not a {' or '.join(classes)}; use another folder")
    has_two_experts = _has_part(index, _SECOND_EXPERT)
    if has_two_experts != (index.get("boundary_ratio") is not None):
        entries = "two experts, but no boundary_ratio" if has_two_experts else "a boundary_ratio, but one expert"
        raise UserError(f"{folder / INDEX} names {entries}; copy or download it again")
    required = [part for part in PARTS if part in _REQUIRED_PARTS or _has_part(index, part)]
    if missing := [part for part in required if not (folder / part).is_dir()]:
        raise MissingError(f"{folder} lacks the folders {', '.join(missing)}; copy or download them too")
    return index


def _has_part(index: dict[str, Any], part: str) -> bool:
    """Return True if a pipeline has a part: others are missing, or listed as two nulls."""
    return bool(index.get(part)) and None not in index[part]


def _read_denoiser(
    denoiser: WanDenoiserFormat, folder: Path, name: str, *, dtype: Dtype, place: Placement
) -> tuple[WanDitConfig, dict[str, Any]]:
    """Read one expert, with the weights of matrix products in `dtype`, if theirs are too, and all others in float32."""
    config, params = denoiser.load(
        folder, kernel_dtype=jnp.dtype(dtype), place=lambda path, parameter: place(f"{name}/{path}", parameter)
    )
    return replace(config, dtype=dtype), params
