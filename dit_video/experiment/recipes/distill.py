"""Distillation of any checkpoint into a few-step student: the experiment of the student."""

import os
from dataclasses import dataclass, field
from typing import Literal

from dit_video.core.errors import UserError
from dit_video.diffusion import TEXT, Guidance, Lcm
from dit_video.distributed import Parallelism
from dit_video.experiment.recipes.starting_model import StartingModel, read_starting_model, set_precision
from dit_video.experiment.run import Experiment
from dit_video.experiment.stages.denoiser import TrainDenoiser
from dit_video.experiment.training_config import Student
from dit_video.nn import LoraConfig, Remat
from dit_video.nn.attention import BackendName
from dit_video.sampling import Sampling
from dit_video.training.losses.distillation import ConsistencyDistillation, Distillation, DistributionMatching
from dit_video.training.optim.optimizer import AdamW, Muon, OptimizerConfig
from dit_video.training.optim.schedules import WarmupStableDecay

_LEARNING_RATES = {"consistency": 1e-3, "dmd": 3e-4}
_LORA_LEARNING_RATE = 1e-4


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
    own, that of its authors for open weights."""
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
    limits = {"max_pixels": options.max_pixels, "max_frames": options.max_frames}
    teacher = read_starting_model(folder, limits=limits, fps=options.fps)
    _check_teacher(teacher)
    own = teacher.sampling.guidance
    guidance = own if options.guidance is None else Guidance(scales={TEXT: options.guidance})
    scale = guidance.get_scale(TEXT)
    if guidance != Guidance(scales={TEXT: scale}):
        raise UserError(f"guidance={guidance} is invalid: a teacher is distilled at one scale; set it with --guidance")
    train = options.train or ("lora" if teacher.is_open else "full")
    return Experiment(
        name=f"{teacher.name}-{options.method}",
        seed=options.seed,
        data=teacher.data,
        model=set_precision(teacher.model, dtype=options.dtype, remat=options.remat, attention=options.attention),
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


def _check_teacher(teacher: StartingModel) -> None:
    backbone = teacher.model.backbone
    has_clean_tokens = backbone.time == "token" and not teacher.is_open
    has_frames = bool(backbone.cond_channels) or teacher.model.frame_conditioning is not None or has_clean_tokens
    if teacher.boundary is not None or has_frames or teacher.is_image:
        kind = "open weights of images, or a model with two experts or with conditioning frames"
        raise UserError(f"{teacher.folder} holds {kind}; distil a text-to-video model with one denoiser")


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
