"""Class-conditional image pipelines, DiT and SiT, from diffusers' folders (`DiTPipeline`) or the authors' weights.

A class, given by its name or number, takes the place of the prompt; the empty prompt means no class:
`pipeline.generate(207)`, or `generate_many([Request("golden retriever", pipeline.config.size), ...])`.

As in diffusers' pipeline, guidance acts on all latent channels and is 4 by default, and the learned variance comes from
the conditional branch. diffusers' schedulers never read that variance. Here it is dropped only with a DDPM scheduler of
fixed variance. It is used by `solver="ddpm"` with any other scheduler, and by `learned_range`, which fails in
diffusers' pipeline. A model without a scheduler, such as the authors', is sampled by DDPM with 250 of its 1000 steps
(DiT), or along its flow (SiT).
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from dit_video.core.errors import MissingError, UserError
from dit_video.core.files import read_json
from dit_video.diffusion import (
    Ddpm,
    DiscreteSchedule,
    Epsilon,
    Heun,
    LearnedVariance,
    Prediction,
    RectifiedFlow,
    Uniform,
    UniformTimes,
    VariancePreservingProcess,
    Velocity,
)
from dit_video.families.autoencoders import read_autoencoder_config
from dit_video.families.dit.transformer import DitDenoiserFormat
from dit_video.families.family import (
    INDEX,
    Family,
    LoadOptions,
    PipelineParts,
    check_channels,
    find_shape,
    make_open_config,
)
from dit_video.models.backbones.dit import DiTConfig
from dit_video.models.backbones.positions import ImageSineCosine
from dit_video.models.backbones.protocol import BackboneConfig
from dit_video.models.encoders import ClassNamesConfig
from dit_video.sampling.pipeline_config import PipelineConfig
from dit_video.tokens import Grid
from dit_video.weights import LoadedScheduler, load_scheduler

CLASS = "DiTPipeline"
DENOISER = DitDenoiserFormat()
_REQUIRED_PARTS = ("transformer", "vae")
PARTS = (*_REQUIRED_PARTS, "scheduler")
"""Subfolders of a pipeline that are read."""
_STEPS, _AUTHORS_STEPS, _GUIDANCE, _BATCH = 50, 250, 4.0, 8


class DitFamily(Family):
    """DiT (arXiv 2212.09748) and SiT (arXiv 2401.08740), in diffusers' folders or from their authors."""

    name = "dit"
    denoiser = DENOISER
    parts = PARTS
    pipeline_classes = (CLASS,)

    def is_pipeline(self, folder: Path) -> bool:
        """Return True for a folder from diffusers or with the authors' weights: a `transformer` next to a `vae`."""
        has_parts = all((folder / part).is_dir() for part in _REQUIRED_PARTS)
        return super().is_pipeline(folder) or (has_parts and not (folder / INDEX).is_file())

    def recognize(self, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
        pattern = r"(y_embedder|transformer_blocks\.0\.norm1\.emb\.class_embedder)\.embedding_table\.weight"
        if find_shape(shapes, pattern) is None and not re.match(r"[DS]iT-(XL|L|B|S)-\d", path.name):
            return None
        return "facebook/DiT-XL-2-256, or one of your own with the authors' .safetensors in transformer/ beside vae/"

    def make_config(self, folder: Path, options: LoadOptions) -> PipelineConfig:
        """Return the config of a class-conditional image pipeline; its scheduler determines the solver and steps.

        Raises:
          MissingError: If the folder lacks parts.
          UserError: If a text encoder is given, or as `read_parts` does.
        """
        if options.text_encoder is not None:
            raise UserError(f"{folder} is class-conditional and has no text encoder; leave out text_encoder")
        parts = self.read_parts(folder)
        is_authors = parts.schedule.solver == Ddpm() and not (folder / INDEX).is_file()
        steps = _AUTHORS_STEPS if is_authors else _STEPS
        return replace(make_open_config(folder, parts, options, steps=steps, guidance=parts.guidance), batch=_BATCH)

    def read_denoiser_config(self, folder: Path) -> BackboneConfig:
        return self.read_parts(folder).denoiser

    def read_parts(self, folder: Path) -> PipelineParts:
        """Read the configs of a folder, whose classes take the place of a text encoder.

        Args:
          folder: Holds `transformer` and `vae`; a folder of diffusers also holds `scheduler` and `model_index.json`,
            which names the classes. `transformer` holds a model of diffusers, an authors' model with the arguments of
            its class in a `config.json`, or a single file of the authors under its original name.

        Raises:
          MissingError: If the folder does not exist, or lacks parts; the message names all of them.
          UserError: If the model is not class-conditional, a setting is not supported, or the weights do not fit.
        """
        index = read_json(folder / INDEX) if (folder / INDEX).is_file() else {}
        required = PARTS if index else _REQUIRED_PARTS
        if missing := [part for part in required if not (folder / part).is_dir()]:
            raise MissingError(f"{folder} lacks the folders {', '.join(missing)}; copy or download them too")
        transformer = self.find_denoiser(folder, "backbone")
        backbone, autoencoder = DENOISER.read_folder_config(transformer), read_autoencoder_config(folder / "vae")
        check_channels(folder, backbone, autoencoder)
        position = backbone.absolute_position
        if not backbone.classes or not isinstance(position, ImageSineCosine):
            rule = f"a {CLASS} needs a class-conditional DiT"
            raise UserError(f"{transformer} is invalid: {rule}. Load it by dit_video.families.load_denoiser")
        schedule = (
            load_scheduler(folder / "scheduler") if (folder / "scheduler").is_dir() else _get_default_schedule(backbone)
        )
        names = index.get("id2label") or {}
        side, stride, classes = position.side, autoencoder.stride, backbone.classes
        backbone, prediction = _match_schedule(folder, backbone, schedule)
        class_names = tuple(str(names.get(str(number), number)) for number in range(classes)) if names else ()
        return PipelineParts(
            denoiser=backbone,
            autoencoder=autoencoder,
            text=ClassNamesConfig(classes=classes, names=class_names),
            schedule=schedule._replace(prediction=prediction),
            size=Grid(1, side * backbone.patch.h * stride.h, side * backbone.patch.w * stride.w),
            fps=1.0,
            guidance=_GUIDANCE,
            times=Uniform(),
        )

    def find_denoiser(self, folder: Path, expert: str) -> Path:
        """Return the transformer's folder, or the single file in it that its authors published without a config."""
        transformer = super().find_denoiser(folder, expert)
        files = [] if (transformer / "config.json").is_file() else sorted(transformer.glob("*.safetensors"))
        return files[0] if len(files) == 1 else transformer


def _get_default_schedule(backbone: DiTConfig) -> LoadedScheduler:
    """Return the sampling schedule of a model that comes without a scheduler."""
    if backbone.time_embedding.reversed:
        return LoadedScheduler(Heun(), RectifiedFlow(), UniformTimes(), Velocity())
    prediction: Prediction = LearnedVariance() if backbone.variance == "predicted" else Epsilon()
    schedule = DiscreteSchedule(spacing="linspace", step_rounding="nearest")
    return LoadedScheduler(Ddpm(), VariancePreservingProcess(), schedule, prediction)


def _match_schedule(folder: Path, backbone: DiTConfig, schedule: LoadedScheduler) -> tuple[DiTConfig, Prediction]:
    """Return the model with the schedule's number of steps, with or without its variance, and its prediction type."""
    flow = isinstance(schedule.process, RectifiedFlow)
    if flow != backbone.time_embedding.reversed:
        raise UserError(
            f"{folder}: the transformer predicts {'noise' if flow else 'a velocity'}, the scheduler is of a "
            f"{type(schedule.process).__name__}; use the scheduler that the model was trained with"
        )
    prediction = schedule.prediction
    learned = isinstance(prediction, LearnedVariance)
    if learned and backbone.variance != "predicted":
        raise UserError(f"{folder}: the scheduler asks for a learned variance, which the transformer doesn't predict")
    if isinstance(schedule.process, VariancePreservingProcess):
        steps = schedule.process.steps
        backbone = replace(backbone, time_embedding=replace(backbone.time_embedding, scale=float(steps)))
        if backbone.variance == "predicted" and isinstance(schedule.solver, Ddpm) and not learned:
            backbone = replace(backbone, variance="dropped")
        elif backbone.variance == "predicted" and not learned:
            prediction = LearnedVariance(prediction=prediction, steps=steps)
    return backbone, prediction
