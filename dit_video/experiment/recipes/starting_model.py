"""Trained models that recipes start from: open weights, runs and pipelines, with the settings that they take over."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dit_video.core.errors import MissingError, UserError
from dit_video.data.buckets import BucketConfig
from dit_video.diffusion import TEXT, Guidance, LogitNormal, TimeDistribution, UniformWeighting, Weighting
from dit_video.evaluation.config import CaptionEvaluation
from dit_video.evaluation.protocol import EvaluationProtocol
from dit_video.experiment.data_config import DataConfig
from dit_video.experiment.run import Run
from dit_video.experiment.several_models import check_single
from dit_video.families.family import Dtype, PipelineParts, set_text_dtype
from dit_video.families.registry import check_folder, find_family, make_unknown_error
from dit_video.models.encoders import FrozenTextConfig
from dit_video.models.model_config import ModelConfig
from dit_video.nn import Remat
from dit_video.nn.attention import BackendName
from dit_video.sampling import Sampling
from dit_video.sampling.pipeline_config import (
    CONFIG,
    RUN_CONFIG,
    PipelineConfig,
    is_pipeline_folder,
    read_pipeline_config,
)
from dit_video.sampling.request import Conditioner
from dit_video.tokens import PackedShape

_MAX_CLIPS_PER_ROW = 4
"""Largest number of clips of a row of open weights, when they are smaller than the largest."""


class StartingModel(NamedTuple):
    """A trained model, and the settings that an experiment with it takes over."""

    folder: Path
    """Folder of its weights, of which a denoiser's training begins (`init_from`)."""
    name: str
    model: ModelConfig
    autoencoder: Path
    """Folder of the weights of its autoencoder."""
    data: DataConfig
    batch: int
    """Number of rows of a step."""
    sampling: Sampling
    is_open: bool
    """Whether these are open weights, of another project's training."""
    is_image: bool = False
    """Whether these are open weights of a model of images, whose tokens have no position in time."""
    times: TimeDistribution = LogitNormal()
    weighting: Weighting = UniformWeighting()
    time_per: Literal["clip", "frame"] = "clip"
    caption_dropout: float = 0.1
    buckets: BucketConfig | None = None
    evaluation: EvaluationProtocol = CaptionEvaluation()
    conditioner: Conditioner | None = None
    boundary: float | None = None
    """Boundary time of its two experts; None for a model with one denoiser."""


def read_starting_model(
    folder: str | os.PathLike,
    *,
    limits: Mapping[str, int | None],
    fps: float | None = None,
    has_weights: bool = True,
) -> StartingModel:
    """Read the configs of a trained model; no weights are read yet.

    Args:
      folder: A run that has its pipeline, a pipeline, or open weights in diffusers' layout that can be fine-tuned.
      limits: Fields of the data, such as `max_pixels` and `max_frames`; None for the model's own.
      fps: Frame rate of the clips; None for the model's own.
      has_weights: False for a folder of open weights that may lack them, whose training is only planned.

    Raises:
      MissingError: If the folder does not exist, or lacks parts.
      UserError: If the model cannot be trained here, settings are unsupported, or weights do not fit.
    """
    folder = Path(folder).absolute()  # configs outlive the process and its working directory
    limits = {name: value for name, value in limits.items() if value is not None}
    check_folder(folder)
    family = find_family(folder)
    if family is None:
        return _read_own(folder, limits, fps)
    parts = family.read_parts(folder)
    if has_weights:
        family.check_weights(folder, text=parts.text, image_encoder=parts.image_encoder, boundary=parts.boundary)
    return _make_open(parts, folder, limits, fps)


def _make_open(parts: PipelineParts, folder: Path, limits: Mapping[str, Any], fps: float | None) -> StartingModel:
    """Return the model in a folder of open weights, in bfloat16 and with all activations recomputed."""
    data = DataConfig(**{"max_pixels": parts.size.h * parts.size.w, "max_frames": parts.size.t, **limits})
    schedule = parts.schedule
    tokens = data.count_max_clip_tokens(stride=parts.autoencoder.stride, patch=parts.denoiser.patch)
    segments, is_image = _MAX_CLIPS_PER_ROW, parts.size.t == 1
    own_fps = None if is_image else parts.fps  # that of images says nothing of clips
    model = ModelConfig(
        autoencoder=parts.autoencoder,
        backbone=parts.denoiser.replace(dtype="bfloat16", remat="full"),
        text_encoder=set_text_dtype(parts.text, "bfloat16"),
        process=schedule.process,
        prediction=schedule.prediction,
        layout=PackedShape(tokens=tokens, text=max(2 * parts.text.max_tokens, segments), segments=segments),
        frame_conditioning=parts.frame_conditioning,
        image_encoder=parts.image_encoder,
        fps=own_fps if fps is None else fps,
    )
    sampling = Sampling(
        steps=50,
        guidance=Guidance(scales={TEXT: parts.guidance}),
        solver=schedule.solver,
        time_schedule=schedule.time_schedule,
    )
    return StartingModel(
        folder=folder,
        name=_name_folder(folder),
        model=model,
        autoencoder=folder / "vae",
        data=data,
        batch=1,
        sampling=sampling,
        is_open=True,
        is_image=is_image,
        times=parts.times,
        conditioner=parts.conditioner,
        boundary=parts.boundary,
    )


def _read_own(folder: Path, limits: Mapping[str, Any], fps: float | None) -> StartingModel:
    """Return the model in a run or a pipeline of our own, as it was trained."""
    run, start = None, folder if is_pipeline_folder(folder) else folder / "pipeline"
    # RUN/pipeline is trained as RUN is: alone it knows neither the limits of its clips nor how it was trained.
    home = start.parent if start.name == "pipeline" else start
    if (home / RUN_CONFIG).is_file():
        check_single(opened := Run.open(home))
        run = opened.experiment
    if not (start / CONFIG).is_file():
        if run is None:
            raise make_unknown_error(folder)
        raise MissingError(f"{folder} holds no model: it needs {CONFIG} of a finished run. Finish the run")
    config = read_pipeline_config(start)
    if config.previous:
        steps = ", ".join(str(start / "steps" / step.name) for step in config.previous)
        raise UserError(f"{start} holds a model that others are sampled before; use the folder of one, such as {steps}")
    size = config.size
    data = DataConfig(max_pixels=size.h * size.w, max_frames=size.t)
    if run is not None:
        data = run.denoiser.data or run.data
    model = config.model if run is None else replace(config.model, fps=run.get_model().fps)
    if data.max_frames == 1:
        model = replace(model, fps=None)  # that of images says nothing of clips
    data = replace(data, **limits)
    return StartingModel(
        folder=start,
        name=_name_folder(folder) if run is None else run.name,
        model=replace(_make_room(model, config, data), fps=model.fps if fps is None else fps),
        autoencoder=start,
        data=data,
        batch=config.batch,
        sampling=config.sampling,
        is_open=False,
        times=LogitNormal() if run is None else run.denoiser.times,
        weighting=UniformWeighting() if run is None else run.denoiser.weighting,
        time_per="clip" if run is None else run.denoiser.time_per,
        caption_dropout=0.1 if config.caption_dropout is None else config.caption_dropout,
        buckets=None if run is None else run.denoiser.buckets,
        evaluation=config.evaluation or CaptionEvaluation(),
        conditioner=config.conditioner,
        boundary=config.boundary,
    )


def _name_folder(folder: Path) -> str:
    """Return the name of a pipeline's folder, of the run that it is of, or of its repository on the hub."""
    folder = folder.resolve()
    if folder.parent.name == "snapshots":  # of the hub's cache, in models--OWNER--NAME
        return folder.parents[1].name.rpartition("--")[2]
    return folder.parent.name if folder.name == "pipeline" else folder.name


def _make_room(model: ModelConfig, config: PipelineConfig, data: DataConfig) -> ModelConfig:
    """Return the model with rows that have room for the largest clip."""
    if model.layout is None:
        tokens = model.latent_grid(config.size).volume // model.backbone.patch.volume
        model = replace(model, layout=PackedShape(tokens=tokens, text=model.text_encoder.max_tokens, segments=1))
    if isinstance(model.layout, PackedShape):
        tokens = data.count_max_clip_tokens(stride=model.autoencoder.stride, patch=model.backbone.patch)
        model = replace(model, layout=replace(model.layout, tokens=max(tokens, model.layout.tokens)))
    return model


def set_precision(
    model: ModelConfig, *, dtype: Dtype | None, remat: Remat | None, attention: BackendName | None
) -> ModelConfig:
    """Return the model with other dtypes of matrix products, activations that are kept, and attention.

    None keeps the model's own. A frozen text encoder has the dtype of the backbone.
    """
    changes = {"dtype": dtype, "remat": remat, "attention": attention}
    model = model.replace_backbone(**{name: value for name, value in changes.items() if value is not None})
    if not isinstance(model.text_encoder, FrozenTextConfig) or dtype in (None, model.text_encoder.dtype):
        return model
    # Weights in another dtype have another identity, which is noted when they are read.
    return replace(model, text_encoder=replace(model.text_encoder, dtype=dtype, identity=""))
