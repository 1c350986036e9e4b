"""Distillation of any checkpoint into a few-step student: the experiment of the student."""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dit_video.core.errors import UserError
from dit_video.data.buckets import BucketConfig
from dit_video.diffusion import TEXT, Guidance, Lcm, LogitNormal, TimeDistribution, UniformWeighting, Weighting
from dit_video.distributed import Parallelism
from dit_video.evaluation.config import CaptionEvaluation
from dit_video.evaluation.protocol import EvaluationProtocol
from dit_video.experiment.data_config import DataConfig
from dit_video.experiment.recipes.finetune import make_data_config, make_row_shape, read_open_parts
from dit_video.experiment.run import Experiment, Run
from dit_video.experiment.several_models import check_single
from dit_video.experiment.stages.denoiser import TrainDenoiser
from dit_video.experiment.training_config import Student
from dit_video.families.family import INDEX
from dit_video.models.model_config import ModelConfig
from dit_video.nn import LoraConfig, Remat
from dit_video.nn.attention import BackendName
from dit_video.sampling import Sampling
from dit_video.sampling.pipeline_config import RUN_CONFIG, is_pipeline_folder, read_pipeline_config
from dit_video.tokens import PackedShape
from dit_video.training.losses.distillation import ConsistencyDistillation, Distillation, DistributionMatching
from dit_video.training.optim.optimizer import AdamW, Muon, OptimizerConfig
from dit_video.training.optim.schedules import WarmupStableDecay

_LEARNING_RATES = {"consistency": 1e-3, "dmd": 3e-4}
_LORA_LEARNING_RATE = 1e-4
_OPEN_GUIDANCE = 5.0
"""Guidance scale of open weights, as in their pipelines in diffusers."""


@dataclass(frozen=True, kw_only=True)
class DistillationOptions:
    """Options of the distillation of a teacher."""

    method: Literal["consistency", "dmd"] = "consistency"
    """Distillation method. `consistency`: latent consistency. `dmd`: distribution matching (DMD2), whose only data are
    captions and sizes."""
    train: Literal["full", "lora"] | None = None
    """Trained weights of the student, and of DMD's critic. `full`: all of a copy of the teacher. `lora`: adapters on
    the teacher, whose weights are then in memory once. By default `lora` for open weights, and `full` for others."""
    lora: LoraConfig = field(
        default_factory=lambda: LoraConfig(rank=64, alpha=64.0, targets=(r"^backbone/blocks/.*kernel$",))
    )
    steps: int = 1000
    sampling_steps: int = 4
    """Number of sampling steps of the student."""
    guidance: float | None = None
    """Guidance scale of the teacher, which the student learns to imitate without guidance; by default the teacher's
    own, and 5 for open weights."""
    intervals: int = 32
    """Number of steps that the teacher takes from noise to data; `consistency` only."""
    critic_steps: int = 5
    """Number of critic updates for each update of the student; `dmd` only."""
    batch: int | None = None
    """Number of rows of a step; the teacher's by default, and 1 for open weights."""
    max_pixels: int | None = None
    """Largest number of pixels of a frame; the teacher's by default."""
    max_frames: int | None = None
    """Largest number of frames; the teacher's by default."""
    fps: float | None = None
    """Frame rate of the clips; the teacher's by default."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of matrix products, and of weights that are not trained; the teacher's by default, and bfloat16 for open
    weights."""
    remat: Remat | None = None
    """Activations that are kept for the backward pass; the teacher's choice by default, and `full` for open weights."""
    attention: BackendName | None = None
    """Backend of attention; the teacher's by default, where `auto` chooses by platform."""
    parallel: Parallelism = field(default_factory=Parallelism)
    """Number of devices along each axis of the mesh, on which the student is trained and sampled."""
    optimizer: Literal["adamw", "muon"] | None = None
    """Optimizer; `adamw` for adapters and `muon` for all weights by default."""
    learning_rate: float | None = None
    """Learning rate; by default 1e-4 for adapters, and for all weights 1e-3 with `consistency` and 3e-4 with `dmd`."""
    warmup: int = 20
    ema_decay: float = 0.98
    """Decay of the moving average, which is the target of `consistency` and the final student."""
    seed: int = 0
    log_every: int = 20
    save_every: int = 200

    @property
    def limits(self) -> dict[str, Any]:
        """Return the limits of clips that are not the teacher's."""
        limits = {"max_pixels": self.max_pixels, "max_frames": self.max_frames}
        return {name: value for name, value in limits.items() if value is not None}


class _Teacher(NamedTuple):
    """A teacher: its weights and the settings that its student's experiment takes over."""

    folder: Path
    """Folder of its weights."""
    name: str
    model: ModelConfig
    autoencoder: Path
    """Folder of the weights of its autoencoder."""
    times: TimeDistribution
    weighting: Weighting
    buckets: BucketConfig | None
    data: DataConfig
    batch: int
    guidance: Guidance
    evaluation: EvaluationProtocol
    train: Literal["full", "lora"]
    """Weights of a student that are trained by default."""


def make_distillation_experiment(
    folder: str | os.PathLike, options: DistillationOptions = DistillationOptions()
) -> Experiment:
    """Return the experiment that distils the denoiser of a teacher, whose autoencoder is used unchanged.

    No weights are read yet.

    Args:
      folder: A run that has its pipeline, a pipeline, or open weights in diffusers' layout that can be fine-tuned.
      options: Options of the distillation.

    Raises:
      MissingError: If the folder does not exist, or lacks parts.
      UserError: If the model has two experts or conditioning frames, or if options do not fit it.
    """
    folder = Path(folder)
    teacher = _read_open_teacher(folder, options) if (folder / INDEX).is_file() else _read_own_teacher(folder, options)
    guidance = teacher.guidance if options.guidance is None else Guidance(scales={TEXT: options.guidance})
    scale = guidance.get_scale(TEXT)
    if guidance != Guidance(scales={TEXT: scale}):
        raise UserError(f"guidance={guidance} is invalid: a teacher is distilled at one scale; set it with --guidance")
    train = options.train or teacher.train
    changes = {name: getattr(options, name) for name in ("dtype", "remat", "attention")}
    changes = {name: value for name, value in changes.items() if value is not None}
    return Experiment(
        name=f"{teacher.name}-{options.method}",
        seed=options.seed,
        data=teacher.data,
        model=teacher.model.replace_backbone(**changes),
        autoencoder_from=os.fspath(teacher.autoencoder),
        stages=(
            TrainDenoiser(
                batch=options.batch or teacher.batch,
                optimizer=_make_optimizer(options, train),
                steps=options.steps,
                times=teacher.times,
                weighting=teacher.weighting,
                buckets=teacher.buckets,
                ema_decay=options.ema_decay,
                train=Student(
                    init_from=os.fspath(teacher.folder),
                    distillation=_make_distillation(options, scale),
                    lora=options.lora if train == "lora" else None,
                ),
            ),
        ),
        sampling=Sampling(steps=options.sampling_steps, guidance=Guidance(scales={TEXT: 1.0}), solver=Lcm()),
        evaluation=teacher.evaluation,
        parallel=options.parallel,
        log_every=options.log_every,
        save_every=options.save_every,
    )


def _read_own_teacher(folder: Path, options: DistillationOptions) -> _Teacher:
    """Return the teacher in a run or a pipeline."""
    run = None
    if (folder / RUN_CONFIG).is_file():
        check_single(opened := Run.open(folder))
        run = opened.experiment
    start = folder if is_pipeline_folder(folder) else folder / "pipeline"
    config = read_pipeline_config(start)
    model, size = config.model, config.size
    has_frames = bool(model.backbone.cond_channels) or model.backbone.time == "token"
    _check_teacher(folder, boundary=config.boundary, has_frames=has_frames)
    if model.layout is None:
        tokens = model.latent_grid(size).volume // model.backbone.patch.volume
        model = replace(model, layout=PackedShape(tokens=tokens, text=model.text_encoder.max_tokens, segments=1))
    fps = options.fps if run is None or options.fps is not None else run.get_model().fps
    data = DataConfig(max_pixels=size.h * size.w, max_frames=size.t) if run is None else run.data
    return _Teacher(
        folder=start,
        name="shapes" if run is None else run.name,
        model=model if run is None and fps is None else replace(model, fps=fps),
        autoencoder=start,
        times=LogitNormal() if run is None else run.denoiser.times,
        weighting=UniformWeighting() if run is None else run.denoiser.weighting,
        buckets=None if run is None else run.denoiser.buckets,
        data=replace(data, **options.limits),
        batch=config.batch,
        guidance=config.sampling.guidance,
        evaluation=config.evaluation or CaptionEvaluation(),
        train="full",
    )


def _read_open_teacher(folder: Path, options: DistillationOptions) -> _Teacher:
    """Return the teacher in a folder of open weights, with the settings of their fine-tuning."""
    parts = read_open_parts(folder)
    _check_teacher(folder, boundary=parts.boundary, has_frames=parts.frame_conditioning is not None)
    data = make_data_config(parts, max_pixels=options.max_pixels, max_frames=options.max_frames)
    return _Teacher(
        folder=folder,
        name=folder.resolve().name,
        model=ModelConfig(
            autoencoder=parts.autoencoder,
            backbone=parts.denoiser.replace(dtype="bfloat16", remat="full"),
            text_encoder=replace(parts.text, dtype=options.dtype or "bfloat16"),
            process=parts.schedule.process,
            prediction=parts.schedule.prediction,
            layout=make_row_shape(data, parts),
            fps=parts.fps if options.fps is None else options.fps,
        ),
        autoencoder=folder / "vae",
        times=LogitNormal(),
        weighting=UniformWeighting(),
        buckets=None,
        data=data,
        batch=1,
        guidance=Guidance(scales={TEXT: _OPEN_GUIDANCE}),
        evaluation=CaptionEvaluation(),
        train="lora",
    )


def _check_teacher(folder: Path, *, boundary: float | None, has_frames: bool) -> None:
    if boundary is not None or has_frames:
        fix = "distil a text-to-video model with one denoiser"
        raise UserError(f"{folder} holds a model with two experts or with conditioning frames; {fix}")


def _make_optimizer(options: DistillationOptions, train: str) -> OptimizerConfig:
    default_rate = _LORA_LEARNING_RATE if train == "lora" else _LEARNING_RATES[options.method]
    learning_rate = default_rate if options.learning_rate is None else options.learning_rate
    schedule = WarmupStableDecay(warmup=min(options.warmup, options.steps - 1))
    if (options.optimizer or ("adamw" if train == "lora" else "muon")) == "adamw":
        return AdamW(learning_rate=learning_rate, schedule=schedule)
    return Muon(learning_rate=learning_rate, schedule=schedule, rms=0.5)


def _make_distillation(options: DistillationOptions, guidance: float) -> Distillation:
    if options.method == "consistency":
        return ConsistencyDistillation(guidance=guidance, intervals=options.intervals)
    return DistributionMatching(guidance=guidance, steps=options.sampling_steps, critic_steps=options.critic_steps)
