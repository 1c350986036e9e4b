"""Fine-tuning of trained models on clips: the experiment for a folder of open weights, a run or a pipeline."""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from dit_video.core.errors import UserError
from dit_video.diffusion import TEXT, Guidance
from dit_video.distributed import Parallelism
from dit_video.evaluation.config import CaptionEvaluation
from dit_video.experiment.data_config import DataConfig
from dit_video.experiment.initial_weights import has_temporal_layers
from dit_video.experiment.recipes.starting_model import StartingModel, read_starting_model, set_precision
from dit_video.experiment.run import Experiment
from dit_video.experiment.stages.denoiser import TrainDenoiser
from dit_video.experiment.training_config import AllWeights, ExpertConfig, LoraAdapters, TemporalWeights
from dit_video.models.backbones.conversion import add_temporal_layers
from dit_video.models.conditioning import FrameConditioning
from dit_video.models.model_config import ModelConfig
from dit_video.nn import LoraConfig, Remat
from dit_video.nn.attention import BackendName
from dit_video.training.optim.optimizer import Adafactor, AdamW
from dit_video.training.optim.schedules import Constant

_OPTIMIZERS = {"adamw": AdamW, "adafactor": Adafactor}
_LEARNING_RATES = {"lora": 1e-4, "full": 1e-5, "temporal": 1e-5, "scratch": 1e-4}


@dataclass(frozen=True, kw_only=True)
class FineTuningOptions:
    """Options of the fine-tuning of a model; defaults follow the original training.

    Raises:
      UserError: If the learning rate is not positive.
    """

    train: Literal["lora", "full", "temporal", "scratch"] = "lora"
    """Weights that are trained. `lora`: adapters only. `full`: all weights. `temporal`: layers along time, which an
    image model gets. `scratch`: all, from random initial values."""
    expert: Literal["high", "low"] | None = None
    """Expert that is trained, of a model with two (Wan 2.2 A14B): `high` for noisy times, or `low`; each at its own
    times."""
    lora: LoraConfig = field(default_factory=lambda: LoraConfig(targets=(r"^backbone/blocks/.*kernel$",)))
    spatial_layers: int = 1
    """Number of layers of an image model in each group that temporal layers follow, with `train="temporal"`."""
    temporal_layers: int = 1
    """Number of temporal layers that an image model gets after each group."""
    steps: int = 1000
    batch: int | None = None
    """Number of rows of a step; the model's by default, and 1 for open weights. A row of these has one clip of the
    largest size, or several smaller ones."""
    learning_rate: float | None = None
    """Learning rate; by default 1e-4 for adapters and from scratch, 1e-5 for pretrained weights."""
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    """Optimizer. `adafactor` has no momentum and takes hardly any memory, where `adamw` takes twice that of the trained
    weights."""
    warmup: int = 50
    max_pixels: int | None = None
    """Largest number of pixels of a frame; by default the model's (Wan: 480x832, TI2V-5B 704x1280, LTX-Video
    512x704)."""
    max_frames: int | None = None
    """Largest number of frames; by default the model's (Wan: 81, TI2V-5B 121, LTX-Video 161)."""
    fps: float | None = None
    """Frame rate of the clips; by default the model's (Wan: 16, TI2V-5B 24, LTX-Video 25)."""
    clips_per_video: int = 1
    """Number of temporal crops of `max_frames` that are used of a longer clip, spread over its length."""
    first_frame_prob: float | None = None
    """Probability that the first frame of a clip is known, so that image-to-video is trained. By default 0.5 for
    TI2V-5B and LTX-Video, 1 for I2V, which is trained for nothing else, and 0 for other models, which get channels for
    clean latents with it; then all weights are trained."""
    held_out: tuple[str, ...] = ()
    """Names of clips that are reconstructed and reported instead of trained on."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of matrix products, and of weights that are not trained; the model's by default, bfloat16 for open
    weights."""
    remat: Remat | None = None
    """Activations that are kept for the backward pass; the model's choice by default, `full` for open weights.
    `attention` takes more memory and recomputes much less of long clips."""
    attention: BackendName | None = None
    """Backend of attention; the model's by default, where `auto` chooses by platform."""
    parallel: Parallelism = field(default_factory=Parallelism)
    """Number of devices along each axis of the mesh, on which the model is trained and sampled."""
    sampling_steps: int | None = None
    """Number of steps of the samples; the model's by default, 50 for open weights."""
    guidance: float | None = None
    """Scale of guidance of the samples; by default the model's (Wan: 5, LTX-Video: 3)."""
    samples: int = 4
    """Number of captions that are sampled at the end, of training clips and of held-out clips each."""
    seed: int = 0
    log_every: int = 20
    save_every: int = 500

    def __post_init__(self):
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise UserError(f"learning_rate={self.learning_rate} is invalid: it must be positive")


def make_finetuning_experiment(
    folder: str | os.PathLike, options: FineTuningOptions = FineTuningOptions(), *, has_weights: bool = True
) -> Experiment:
    """Return the experiment that fine-tunes the denoiser of a trained model; no weights are read yet.

    The autoencoder and a frozen text encoder are used unchanged; a text encoder that was trained with the denoiser is
    trained with it here, too. Prediction, shift, solver and sampling times are those of the model.

    Args:
      folder: Open weights in diffusers' layout, or of DiT or SiT in their authors', a run that has its pipeline, or a
        pipeline; of a run's, the run's settings are taken over.
      options: Trained weights, number of steps and sizes.
      has_weights: False for a folder of open weights that may lack them, whose training is only planned.

    Raises:
      MissingError: If the folder does not exist, or lacks parts.
      UserError: If the pipeline or the model cannot be fine-tuned here, settings are unsupported, or options do not
        fit.
    """
    limits = {"max_pixels": options.max_pixels, "max_frames": options.max_frames}
    start = read_starting_model(folder, limits=limits, fps=options.fps, has_weights=has_weights)
    model = set_precision(start.model, dtype=options.dtype, remat=options.remat, attention=options.attention)
    model = _grow(start, model, options)
    learning_rate = _LEARNING_RATES[options.train] if options.learning_rate is None else options.learning_rate
    sampling = replace(start.sampling, steps=options.sampling_steps or start.sampling.steps)
    if options.guidance is not None:
        sampling = replace(sampling, guidance=Guidance(scales={TEXT: options.guidance}))
    return Experiment(
        name=start.name,
        seed=options.seed,
        data=DataConfig(
            max_pixels=start.data.max_pixels,
            max_frames=start.data.max_frames,
            clips_per_video=options.clips_per_video,
            held_out=options.held_out,
            cache_latents=start.data.cache_latents,
        ),
        model=model,
        autoencoder_from=os.fspath(start.autoencoder),
        stages=(
            TrainDenoiser(
                batch=options.batch or start.batch,
                optimizer=_OPTIMIZERS[options.optimizer](
                    learning_rate=learning_rate, schedule=Constant(warmup=min(options.warmup, options.steps - 1))
                ),
                steps=options.steps,
                times=start.times,
                weighting=start.weighting,
                time_per=start.time_per,
                caption_dropout=start.caption_dropout,
                buckets=start.buckets,
                ema_decay=0.99,
                train=_select_weights(start, options),
            ),
        ),
        conditioner=start.conditioner,
        sampling=sampling,
        evaluation=CaptionEvaluation(trained=options.samples, held_out=options.samples),
        parallel=options.parallel,
        log_every=options.log_every,
        save_every=options.save_every,
    )


def _grow(start: StartingModel, model: ModelConfig, options: FineTuningOptions) -> ModelConfig:
    """Return the model with the temporal layers and the conditioning on a first frame that options ask for."""
    backbone = model.backbone
    if options.train == "temporal" and start.data.max_frames == 1:
        rule = "temporal layers learn nothing from single frames, which this model was trained on"
        raise UserError(f"max_frames=1 is invalid with train=temporal: {rule}. Use max_frames=17, or more")
    if start.is_image and options.train != "temporal" and start.data.max_frames > 1:
        rule = "the model was trained on images, and does not know the order of frames"
        fix = "Use train=temporal, or leave out max_frames"
        raise UserError(f"max_frames={start.data.max_frames} is invalid with train={options.train}: {rule}. {fix}")
    if options.train == "temporal" and not has_temporal_layers(backbone):
        layers = {"spatial_layers": options.spatial_layers, "layers": options.temporal_layers}
        model = replace(model, backbone=add_temporal_layers(backbone, **layers))
    prob = options.first_frame_prob
    if prob is None or (prob == 0 and model.frame_conditioning is None):
        return model
    if start.conditioner is not None and model.frame_conditioning is None:
        raise UserError("first_frame_prob is invalid: this model keeps frames in a way of its own; leave it out")
    if model.frame_conditioning is not None or backbone.time == "token":
        return replace(model, frame_conditioning=replace(model.frame_conditioning or FrameConditioning(), prob=prob))
    if options.train in ("lora", "temporal"):
        rule = f"the model gets channels for the first frame, which train={options.train} does not train"
        raise UserError(f"first_frame_prob={prob} is invalid: {rule}. Use train=full, or leave it out")
    # The channels of image-to-video models of Wan, or of ours.
    frames = FrameConditioning(prob=prob, rest="grey" if start.is_open else "zero")
    mask_channels = model.autoencoder.stride.t if start.is_open else 1
    grown = model.backbone.replace(cond_channels=mask_channels + model.autoencoder.channels)
    return replace(model, backbone=grown, frame_conditioning=frames)


def _select_weights(start: StartingModel, options: FineTuningOptions) -> AllWeights | TemporalWeights | LoraAdapters:
    """Return what is trained, from the folder's weights unless they are trained from scratch."""
    weights, expert = _select_expert(start, options)
    folder = os.fspath(weights)
    if options.train == "lora":
        return LoraAdapters(init_from=folder, lora=options.lora, expert=expert)
    if options.train == "temporal":
        return TemporalWeights(init_from=folder, expert=expert)
    return AllWeights(init_from=folder if options.train == "full" else None, expert=expert)


def _select_expert(start: StartingModel, options: FineTuningOptions) -> tuple[Path, ExpertConfig | None]:
    """Return the folder of the weights that are trained, and the config of their expert if the model has two."""
    folder, boundary = start.folder, start.boundary
    if boundary is None:
        if options.expert is not None:
            raise UserError(f"expert={options.expert} is invalid: {folder} has one transformer; leave out expert")
        return folder, None
    if not start.is_open:
        fix = "Use the folder of open weights that it was made of"
        raise UserError(f"{folder} is a pipeline of two experts, which is not fine-tuned further. {fix}")
    if options.expert is None:
        fix = f"set expert=high, for times from {boundary} on, or expert=low"
        raise UserError(f"{folder} has two experts, which are trained one at a time; {fix}")
    high, low = folder / "transformer", folder / "transformer_2"
    first, other = (high, low) if options.expert == "high" else (low, high)
    return first, ExpertConfig(expert=options.expert, boundary=boundary, other_folder=os.fspath(other))
