"""Wan's pipelines, from diffusers' folders: `WanPipeline` and `WanImageToVideoPipeline`, 2.1 and 2.2.

Settings that are not in a folder are those of diffusers' pipeline: clips of 81 frames of 480×832 at 16 frames a second
(24 for the model with a time per token, TI2V-5B), 50 steps, guidance 5; texts are cleaned and cut to 512 tokens, the
denoiser pads them with zeros and attends to the padding.
"""

import functools
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from dit_video.backbones.wan import WanDitConfig
from dit_video.conditioning import FrameConditioning
from dit_video.core.errors import MissingError, UserError
from dit_video.core.files import read_json
from dit_video.distributed import MeshConfig
from dit_video.families.autoencoders import load_placed_autoencoder, read_autoencoder_config
from dit_video.families.family import INDEX, Dtype, Family, PipelineParts
from dit_video.families.wan.transformer import WanDenoiserFormat
from dit_video.generation import Sampling
from dit_video.pipelines.config import PipelineConfig
from dit_video.pipelines.pipeline import Pipeline
from dit_video.text import FrozenTextConfig
from dit_video.tokens import Grid
from dit_video.weights import load_scheduler, read_clip_vision_config, read_text_encoder_config
from dit_video.weights.parameter import Placement, place_on_device, place_on_host

_SECOND_EXPERT, _IMAGE_PARTS = "transformer_2", ("image_encoder", "image_processor")
_REQUIRED_PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
PARTS = (*_REQUIRED_PARTS, _SECOND_EXPERT, *_IMAGE_PARTS)
"""Subfolders of a pipeline that are read."""
CLASSES = ("WanPipeline", "WanImageToVideoPipeline")
DENOISER = WanDenoiserFormat()
_STEPS, _GUIDANCE, _SIZE, _FPS = 50, 5.0, Grid(81, 480, 832), 16.0
_TOKEN_TIME_SIZE, _TOKEN_TIME_FPS = Grid(121, 704, 1280), 24.0


class WanFamily(Family):
    """Wan 2.1 and 2.2 (arXiv 2503.20314): text to video and image to video, in diffusers' folders."""

    name = "wan"
    denoiser = DENOISER
    parts = PARTS
    pipeline_classes = CLASSES

    def load_pipeline(
        self,
        folder: Path,
        *,
        text_encoder: str | os.PathLike | None,
        dtype: Dtype,
        place: Placement | None,
        mesh: MeshConfig | Mesh | None,
    ) -> Pipeline:
        """Load a pipeline from a folder of diffusers; solver, shift and time schedule are those of its scheduler.

        Parameters are read one at a time, of a stack one layer at a time, and placed by `place`.

        Args:
          folder: holds `model_index.json` and the parts that it names.
          text_encoder: folder of the text encoder, if not the pipeline's own. It is read at the first prompt.
          dtype: dtype of the denoiser's matrix products and of their weights, and of the text encoder's.
          place: places a parameter, given its path: `backbone/…`, `low_noise/…` of a second expert, `autoencoder/…`;
            for devices `lambda path, parameter: parameter.to_device(SHARDING)`. By default parameters go to the default
            device; two experts stay on the host, and only the one in use is on the device.
          mesh: devices that sample together, to which `place` reads; None for one device.

        Raises:
          MissingError: the folder does not exist, or lacks parts, all of which are named.
          UserError: a pipeline or a model of an unknown class, unsupported settings, or weights that do not fit.
        """
        parts = read_parts(folder, text_encoder=text_encoder)
        default_place = place_on_device if parts.boundary is None else place_on_host
        read = functools.partial(_read_denoiser, dtype=dtype, place=place or default_place)
        backbone, params = read(folder / "transformer", "backbone")
        denoiser = {"backbone": params, "text": {}}
        if parts.boundary is not None:
            second, denoiser["low_noise"] = read(folder / _SECOND_EXPERT, "low_noise")
            if second != backbone:
                raise UserError(
                    f"{folder} has two experts of different shapes, {backbone} and {second}; they must be equal"
                )
        autoencoder, autoencoder_params = load_placed_autoencoder(folder, backbone.channels, place or place_on_device)
        schedule = parts.schedule
        config = PipelineConfig(
            autoencoder=autoencoder,
            backbone=backbone,
            text=replace(parts.text, dtype=dtype),
            process=schedule.process,
            prediction=schedule.prediction,
            layout=None,
            batch=1,
            sampling=Sampling(
                steps=_STEPS, guidance=_GUIDANCE, solver=schedule.solver, time_schedule=schedule.time_schedule
            ),
            fps=parts.fps,
            size=_SIZE,
            boundary=parts.boundary,
            frame_conditioning=parts.frame_conditioning,
            image_encoder=parts.image_encoder,
            provenance={"loaded from": os.fspath(folder), "class": read_index(folder)["_class_name"]},
        )
        parameters = {"autoencoder": autoencoder_params, "denoiser": denoiser}
        return Pipeline(config, **parameters, get_lora_modules=DENOISER.get_lora_modules, mesh=mesh)

    def read_parts(self, folder: Path) -> PipelineParts:
        return read_parts(folder)


def read_parts(folder: Path, *, text_encoder: str | os.PathLike | None = None) -> PipelineParts:
    """Read the configs of a folder of diffusers, and check that its parts fit each other.

    Raises:
      MissingError: the folder does not exist, or lacks parts, all of which are named.
      UserError: a pipeline or a model of an unknown class, unsupported settings, or parts that do not fit.
    """
    index = read_index(folder)
    schedule = load_scheduler(folder / "scheduler")
    encoder = folder / "text_encoder" if text_encoder is None else Path(text_encoder)
    width = read_text_encoder_config(encoder).width
    backbone = DENOISER.read_folder_config(folder / "transformer")
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


def read_index(folder: Path) -> dict[str, Any]:
    """Return `model_index.json` after checking that all its parts exist; two experts have a `boundary_ratio` in it.

    Raises:
      MissingError: the folder does not exist, or lacks parts.
      UserError: a pipeline of an unknown class, or two experts without a boundary.
    """
    index = read_json(folder / INDEX)
    name = index.get("_class_name") if isinstance(index, dict) else None
    if name not in CLASSES:
        raise UserError(f"{folder} holds a pipeline of class {name}, not a {' or '.join(CLASSES)}; use another folder")
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


def _read_denoiser(folder: Path, name: str, *, dtype: Dtype, place: Placement) -> tuple[WanDitConfig, dict[str, Any]]:
    """Read one expert, with the weights of matrix products in `dtype` and all others in float32."""
    config, params = DENOISER.load(
        folder, kernel_dtype=jnp.dtype(dtype), place=lambda path, parameter: place(f"{name}/{path}", parameter)
    )
    return replace(config, dtype=dtype), params
