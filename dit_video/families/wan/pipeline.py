"""Wan's pipelines, from diffusers' folders: `WanPipeline` and `WanImageToVideoPipeline`, 2.1 and 2.2, and FastWan.

Defaults of sampling are the authors' (`families.wan.defaults`), at 16 frames a second (24 for the model with a time per
token, TI2V-5B). As in diffusers' pipeline, texts are cleaned and cut to 512 tokens, and the denoiser pads them with
zeros and attends to the padding.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

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
    find_shape,
    make_open_config,
    read_pipeline_class,
)
from dit_video.families.wan.transformer import WanDenoiserFormat
from dit_video.models.backbones.vace import VaceDitConfig
from dit_video.models.backbones.wan import WanDitConfig
from dit_video.models.conditioning import FrameConditioning
from dit_video.models.encoders import FrozenTextConfig
from dit_video.sampling.denoiser import list_experts
from dit_video.sampling.pipeline_config import PipelineConfig
from dit_video.tokens import Grid
from dit_video.weights import load_scheduler, read_clip_vision_config, read_text_encoder_config

# `sample_neg_prompt` of wan/configs/shared_config.py in both repositories; the prompts of I2V and FLF2V begin with more
# words (wan/configs/wan_i2v_14B.py and wan/configs/__init__.py of Wan2.1).
NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，"
    "残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，"
    "三条腿，背景人很多，倒着走"
)
_IMAGE_NEGATIVE = "镜头晃动，" + NEGATIVE
_FIRST_AND_LAST_NEGATIVE = "镜头切换，" + _IMAGE_NEGATIVE
_SMALL_SIZE, _LARGE_SIZE = Grid(81, 480, 832), Grid(81, 720, 1280)


class WanDefaults(NamedTuple):
    """Defaults of sampling."""

    size: Grid = _SMALL_SIZE
    """Frames, height and width."""
    steps: int = 50
    guidance: float | tuple[float, float] = 5.0
    """Guidance scale; one per expert if there are two, the one for noisy times first."""
    shift: float | None = None
    """Shift of times; None for the folder's."""
    negative: str = ""
    """Negative prompt."""


class _Model(NamedTuple):
    """Properties that tell a published model from the others."""

    width: int
    layers: int
    input: Literal["text", "image", "first and last image", "text or image", "control"]
    experts: int
    flow_shift: float
    """Shift in the published folder's scheduler_config.json; a folder with another shift keeps its own."""


_DIFFUSERS = WanDefaults()
_DIFFUSERS_TOKEN_TIME = WanDefaults(size=Grid(121, 704, 1280))
"""Defaults of diffusers' pipelines, for models that were not published by Wan's authors."""

# Their configs differ at most in the shift, which the authors choose by the size.
_SMALL_IMAGE_MODEL = _Model(5120, 40, "image", 1, 3.0)
_LARGE_IMAGE_MODEL = _SMALL_IMAGE_MODEL._replace(flow_shift=5.0)

_PUBLISHED: dict[_Model, WanDefaults] = {
    # 2.1 T2V-1.3B: guidance 6 and a shift of 8 to 12 are recommended in README.md.
    _Model(1536, 30, "text", 1, 3.0): WanDefaults(guidance=6.0, shift=8.0, negative=NEGATIVE),
    # 2.1 T2V-14B.
    _Model(5120, 40, "text", 1, 3.0): WanDefaults(size=_LARGE_SIZE, shift=5.0, negative=NEGATIVE),
    # 2.1 I2V-14B-480P and 720P.
    _SMALL_IMAGE_MODEL: WanDefaults(steps=40, shift=3.0, negative=_IMAGE_NEGATIVE),
    _LARGE_IMAGE_MODEL: WanDefaults(size=_LARGE_SIZE, steps=40, shift=5.0, negative=_IMAGE_NEGATIVE),
    # 2.1 FLF2V-14B-720P.
    _Model(5120, 40, "first and last image", 1, 16.0): WanDefaults(
        size=_LARGE_SIZE, shift=16.0, negative=_FIRST_AND_LAST_NEGATIVE
    ),
    # 2.2 T2V-A14B; the authors list the low-noise expert's guidance first.
    _Model(5120, 40, "text", 2, 3.0): WanDefaults(
        size=_LARGE_SIZE, steps=40, guidance=(4.0, 3.0), shift=12.0, negative=NEGATIVE
    ),
    # 2.2 I2V-A14B.
    _Model(5120, 40, "image", 2, 3.0): WanDefaults(
        size=_LARGE_SIZE, steps=40, guidance=(3.5, 3.5), shift=5.0, negative=NEGATIVE
    ),
    # 2.1 VACE-1.3B and 14B.
    _Model(1536, 30, "control", 1, 3.0): WanDefaults(shift=16.0, negative=NEGATIVE),
    _Model(5120, 40, "control", 1, 3.0): WanDefaults(size=_LARGE_SIZE, shift=16.0, negative=NEGATIVE),
    # 2.2 TI2V-5B.
    _Model(3072, 30, "text or image", 1, 5.0): _DIFFUSERS_TOKEN_TIME._replace(shift=5.0, negative=NEGATIVE),
}


def find_defaults(backbone: WanDitConfig, *, experts: int, flow_shift: float, name: str = "") -> WanDefaults:
    """Return the defaults of a model: its authors', if the folder has the config of a published one, or diffusers'.

    Args:
      backbone: Config of its denoiser.
      experts: Number of its denoisers, 1 or 2.
      flow_shift: Shift of the folder's scheduler.
      name: Path of the folder; a part such as `I2V-14B-720P` tells 2.1 I2V-14B-480P from 720P.
    """
    model = _Model(backbone.width, backbone.layers, _get_input(backbone), experts, flow_shift)
    resolution = re.search("i2v[^/]*(480|720)p", name.lower())
    if resolution is not None and model[:-1] == _SMALL_IMAGE_MODEL[:-1]:
        published = _SMALL_IMAGE_MODEL if resolution[1] == "480" else _LARGE_IMAGE_MODEL
        defaults, is_changed = _PUBLISHED[published], flow_shift not in (3.0, 5.0)
        return defaults._replace(shift=None) if is_changed else defaults
    if model in _PUBLISHED:
        return _PUBLISHED[model]
    # A folder whose shift was changed keeps it.
    same = (each for other, each in _PUBLISHED.items() if other[:-1] == model[:-1])
    other = _DIFFUSERS_TOKEN_TIME if backbone.time == "token" else _DIFFUSERS
    return next(same, other)._replace(shift=None)


def _get_input(
    backbone: WanDitConfig,
) -> Literal["text", "image", "first and last image", "text or image", "control"]:
    if isinstance(backbone, VaceDitConfig):
        return "control"
    if backbone.time == "token":
        return "text or image"
    if backbone.image_positions is not None:
        return "first and last image"
    return "image" if backbone.cond_channels else "text"


_SECOND_EXPERT, _IMAGE_PARTS = DENOISER_FOLDERS["low_noise"], ("image_encoder", "image_processor")
_REQUIRED_PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
PARTS = (*_REQUIRED_PARTS, _SECOND_EXPERT, *_IMAGE_PARTS)
"""Subfolders of a pipeline that are read."""
_DISTILLED = "WanDMDPipeline"
"""Class of FastVideo's FastWan, Wan distilled to few steps (DMD2)."""
_DISTILLED_TIMES = (1.0, 0.757, 0.522)
"""Times at which its steps start: its `dmd_denoising_steps`, of 1000."""
CLASSES = ("WanPipeline", "WanImageToVideoPipeline", _DISTILLED)
DENOISER = WanDenoiserFormat()
_SIZE, _FPS = Grid(81, 480, 832), 16.0
_TOKEN_TIME_SIZE, _TOKEN_TIME_FPS = Grid(121, 704, 1280), 24.0


class WanFamily(Family):
    """Wan 2.1 and 2.2 (arXiv 2503.20314): text to video and image to video, in diffusers' folders."""

    name = "wan"
    denoiser: ClassVar[WanDenoiserFormat] = DENOISER
    parts = PARTS
    pipeline_classes: ClassVar[tuple[str, ...]] = CLASSES

    def recognize(self, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
        query = find_shape(shapes, r"blocks\.0\.(self_attn\.q|attn1\.to_q)\.weight")
        if query is None:
            return None
        inputs = find_shape(shapes, r"patch_embedding\.weight") or (0, 0)
        if query[0] != 5120:
            return f"Wan-AI/Wan2.{'2-TI2V-5B' if query[0] == 3072 else '1-T2V-1.3B'}-Diffusers"
        if inputs[1] <= 16:
            is_expert = re.search("(high|low)_noise", os.fspath(path)) is not None
            return f"Wan-AI/Wan2.{'2-T2V-A14B' if is_expert else '1-T2V-14B'}-Diffusers"
        reads_image = find_shape(shapes, r"img_emb\..*|image_embedder\..*") is not None
        return f"Wan-AI/Wan2.{'1-I2V-14B-480P' if reads_image else '2-I2V-A14B'}-Diffusers"

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
        config = make_open_config(folder, parts, options, **sampling, negative=defaults.negative)
        if read_pipeline_class(folder) != _DISTILLED:
            return config
        few = config.sampling.change(config.model.process, times=_DISTILLED_TIMES, solver="lcm", guidance=1.0)
        return replace(config, sampling=few)

    def read_parts(self, folder: Path, *, text_encoder: str | os.PathLike | None = None) -> PipelineParts:
        return _read_parts(folder, self.denoiser, self.pipeline_classes, text_encoder)


def _read_parts(
    folder: Path, denoiser: WanDenoiserFormat, classes: tuple[str, ...], text_encoder: str | os.PathLike | None
) -> PipelineParts:
    """Read the configs of a folder of diffusers, and check that its parts fit each other.

    Raises:
      MissingError: If the folder does not exist, or lacks parts; the message names all of them.
      UserError: If the class of the pipeline or of a model is unknown, a setting is not supported, or the parts do not
        fit.
    """
    index = _read_index(folder, classes)
    schedule = load_scheduler(folder / "scheduler")
    # Configs outlive the process and its working directory.
    encoder = (folder / "text_encoder" if text_encoder is None else Path(text_encoder)).absolute()
    width = read_text_encoder_config(encoder).width
    backbone, autoencoder = denoiser.read_folder_config(folder / "transformer"), read_autoencoder_config(folder / "vae")
    check_channels(folder, backbone, autoencoder)
    check_context_width(encoder, width, backbone)
    second = denoiser.read_folder_config(folder / _SECOND_EXPERT) if _has_part(index, _SECOND_EXPERT) else backbone
    if second != backbone:
        rule = f"it holds two experts of different shapes, {backbone} and {second}"
        raise UserError(f"{folder} is invalid: {rule}. Copy or download it again")
    images = (folder / "image_encoder").absolute() if backbone.image_width is not None else None
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
    """Return the conditioning that the models were trained with: I2V always had an image, TI2V-5B sometimes."""
    if backbone.cond_channels:
        return FrameConditioning(prob=1.0, rest="grey")
    return FrameConditioning() if backbone.time == "token" else None


def _read_index(folder: Path, classes: tuple[str, ...]) -> dict[str, Any]:
    """Return `model_index.json` after checking that all its parts exist; with two experts it has a `boundary_ratio`.

    Raises:
      MissingError: If the folder does not exist, or lacks parts.
      UserError: If the pipeline's class is unknown, or two experts have no boundary.
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
    """Return True if a pipeline has a part; absent parts are not in the index, or are listed as two nulls."""
    return bool(index.get(part)) and None not in index[part]
