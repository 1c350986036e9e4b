"""Wan's pipelines, from diffusers' folders: `WanPipeline` and `WanImageToVideoPipeline`, 2.1 and 2.2.

Defaults of sampling are the authors' (`families.wan.defaults`), at 16 frames a second (24 for the model with a time per
token, TI2V-5B). As in diffusers' pipeline, texts are cleaned and cut to 512 tokens, and the denoiser pads them with
zeros and attends to the padding.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from dit_video.core.errors import MissingError, UserError
from dit_video.core.files import read_json
from dit_video.diffusion import RectifiedFlow
from dit_video.families.autoencoders import read_autoencoder_config
from dit_video.families.family import (
    DENOISER_FOLDERS,
    INDEX,
    Family,
    LoadOptions,
    PipelineParts,
    check_channels,
    check_context_width,
    make_open_config,
)
from dit_video.families.wan.defaults import find_defaults
from dit_video.families.wan.transformer import WanDenoiserFormat
from dit_video.models.backbones.wan import WanDitConfig
from dit_video.models.conditioning import FrameConditioning
from dit_video.models.encoders import FrozenTextConfig
from dit_video.sampling.denoiser import list_experts
from dit_video.sampling.pipeline_config import PipelineConfig
from dit_video.tokens import Grid
from dit_video.weights import load_scheduler, read_clip_vision_config, read_text_encoder_config

_SECOND_EXPERT, _IMAGE_PARTS = DENOISER_FOLDERS["low_noise"], ("image_encoder", "image_processor")
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

    def make_config(self, folder: Path, options: LoadOptions) -> PipelineConfig:
        parts = self.read_parts(folder, text_encoder=options.text_encoder)
        assert isinstance(parts.denoiser, WanDitConfig)
        process = parts.schedule.process
        flow_shift = process.shift if isinstance(process, RectifiedFlow) else 1.0
        experts = len(list_experts(parts.boundary))
        defaults = find_defaults(parts.denoiser, experts=experts, flow_shift=flow_shift, name=os.fspath(folder))
        if defaults.shift is not None and isinstance(process, RectifiedFlow):
            process = replace(process, shift=defaults.shift)
        parts = parts._replace(size=defaults.size, schedule=parts.schedule._replace(process=process))
        sampling: dict[str, Any] = {"steps": defaults.steps, "guidance": defaults.guidance}
        return make_open_config(folder, parts, options, **sampling, negative=defaults.negative)

    def read_parts(self, folder: Path, *, text_encoder: str | os.PathLike | None = None) -> PipelineParts:
        return _read_parts(folder, self.denoiser, self.pipeline_classes, text_encoder)


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
    backbone, autoencoder = denoiser.read_folder_config(folder / "transformer"), read_autoencoder_config(folder / "vae")
    check_channels(folder, backbone, autoencoder)
    check_context_width(encoder, width, backbone)
    second = denoiser.read_folder_config(folder / _SECOND_EXPERT) if _has_part(index, _SECOND_EXPERT) else backbone
    if second != backbone:
        rule = f"it holds two experts of different shapes, {backbone} and {second}"
        raise UserError(f"{folder} is invalid: {rule}. Copy or download it again")
    images = folder / "image_encoder" if backbone.image_width is not None else None
    if images is not None and (image_width := read_clip_vision_config(images).width) != backbone.image_width:
        rule = f"it makes tokens of width {image_width}, the transformer reads {backbone.image_width}"
        raise UserError(f"{images} is invalid: {rule}. Use the model's own image encoder")
    return PipelineParts(
        denoiser=backbone,
        autoencoder=autoencoder,
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
