"""Fine-tuning of open weights on clips: the experiment for a pipeline's folder."""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from dit_video.core.errors import MissingError, UserError
from dit_video.diffusion import TEXT, Guidance
from dit_video.distributed import Parallelism
from dit_video.evaluation.config import CaptionEvaluation
from dit_video.experiment.data_config import DataConfig
from dit_video.experiment.run import Experiment
from dit_video.experiment.stages.denoiser import TrainDenoiser
from dit_video.experiment.training_config import AllWeights, ExpertConfig, LoraAdapters, TemporalWeights
from dit_video.families import PipelineParts, find_family
from dit_video.families.family import INDEX
from dit_video.models.conditioning import FrameConditioning
from dit_video.models.model_config import ModelConfig
from dit_video.nn import LoraConfig, Remat
from dit_video.nn.attention import BackendName
from dit_video.sampling import Sampling
from dit_video.tokens import PackedShape
from dit_video.training.optim.optimizer import AdamW
from dit_video.training.optim.schedules import Constant

_MAX_CLIPS_PER_ROW = 4
"""Largest number of clips of a row, when they are smaller than the largest."""


_LEARNING_RATES = {"lora": 1e-4, "full": 1e-5, "temporal": 1e-5, "scratch": 1e-4}


@dataclass(frozen=True, kw_only=True)
class FineTuningOptions:
    """Options of the fine-tuning of open weights; defaults follow the original training.

    Raises:
      UserError: If the learning rate is not positive.
    """

    train: Literal["lora", "full", "temporal", "scratch"] = "lora"
    """Weights that are trained. `lora`: adapters only. `full`: all weights. `temporal`: layers along time. `scratch`:
    all, from random initial values."""
    expert: Literal["high", "low"] | None = None
    """Expert that is trained, of a model with two (Wan 2.2 A14B): `high` for noisy times, or `low`; each at its own
    times."""
    lora: LoraConfig = field(default_factory=lambda: LoraConfig(targets=(r"^backbone/blocks/.*kernel$",)))
    steps: int = 1000
    batch: int = 1
    """Number of rows of a step. A row has one clip of the largest size, or several smaller ones."""
    learning_rate: float | None = None
    """Learning rate; by default 1e-4 for adapters and from scratch, 1e-5 for pretrained weights."""
    warmup: int = 50
    max_pixels: int | None = None
    """Largest number of pixels of a frame; by default the family's (Wan: 480x832, TI2V-5B 704x1280, LTX-Video
    512x704)."""
    max_frames: int | None = None
    """Largest number of frames; by default the family's (Wan: 81, TI2V-5B 121, LTX-Video 161)."""
    fps: float | None = None
    """Frame rate of the clips; by default the family's (Wan: 16, TI2V-5B 24, LTX-Video 25)."""
    clips_per_video: int = 1
    """Number of temporal crops of `max_frames` that are used of a longer clip, spread over its length."""
    first_frame_prob: float | None = None
    """Probability that the first frame of a clip is known, so that image-to-video is trained. By default 0.5 for
    TI2V-5B and LTX-Video, and 1 for I2V, which is trained for nothing else. Other models do not accept it."""
    held_out: tuple[str, ...] = ()
    """Names of clips that are reconstructed and reported instead of trained on."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of matrix products, and of weights that are not trained."""
    remat: Remat = "full"
    """Activations that are kept for the backward pass; `attention` takes more memory and recomputes much less of long
    clips."""
    attention: BackendName = "auto"
    """Backend of attention; `auto` chooses by platform."""
    parallel: Parallelism = field(default_factory=Parallelism)
    """Number of devices along each axis of the mesh, on which the model is trained and sampled."""
    sampling_steps: int = 50
    guidance: float | None = None
    """Scale of guidance of the samples; by default the family's (Wan: 5, LTX-Video: 3)."""
    samples: int = 4
    """Number of captions that are sampled at the end, of training clips and of held-out clips each."""
    seed: int = 0
    log_every: int = 20
    save_every: int = 500

    def __post_init__(self):
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise UserError(f"learning_rate={self.learning_rate} is invalid: it must be positive")


def make_finetuning_experiment(
    folder: str | os.PathLike, options: FineTuningOptions = FineTuningOptions()
) -> Experiment:
    """Return the experiment that fine-tunes the denoiser of a pipeline's folder; no weights are read yet.

    The autoencoder and the text encoder are used unchanged. Prediction, shift, solver and sampling times are those of
    the folder's scheduler.

    Args:
      folder: A folder in diffusers' layout, with `model_index.json`.
      options: Trained weights, number of steps and sizes.

    Raises:
      MissingError: If the folder does not exist, or lacks parts.
      UserError: If the pipeline or the model cannot be fine-tuned here, settings are unsupported, or options do not
        fit.
    """
    folder, parts = Path(folder), read_open_parts(folder)
    backbone = parts.denoiser.replace(dtype=options.dtype, remat=options.remat, attention=options.attention)
    schedule, text = parts.schedule, replace(parts.text, dtype=options.dtype)
    data = make_data_config(
        parts,
        max_pixels=options.max_pixels,
        max_frames=options.max_frames,
        clips_per_video=options.clips_per_video,
        held_out=options.held_out,
    )
    learning_rate = _LEARNING_RATES[options.train] if options.learning_rate is None else options.learning_rate
    return Experiment(
        name=folder.resolve().name,
        seed=options.seed,
        data=data,
        model=ModelConfig(
            autoencoder=parts.autoencoder,
            backbone=backbone,
            text_encoder=text,
            process=schedule.process,
            prediction=schedule.prediction,
            layout=make_row_shape(data, parts),
            frame_conditioning=_make_frame_conditioning(options, parts),
            image_encoder=parts.image_encoder,
            fps=parts.fps if options.fps is None else options.fps,
        ),
        autoencoder_from=os.fspath(folder / "vae"),
        stages=(
            TrainDenoiser(
                batch=options.batch,
                optimizer=AdamW(
                    learning_rate=learning_rate, schedule=Constant(warmup=min(options.warmup, options.steps - 1))
                ),
                steps=options.steps,
                ema_decay=0.99,
                train=_select_weights(folder, parts.boundary, options),
            ),
        ),
        conditioner=parts.conditioner,
        sampling=Sampling(
            steps=options.sampling_steps,
            guidance=Guidance(scales={TEXT: parts.guidance if options.guidance is None else options.guidance}),
            solver=schedule.solver,
            time_schedule=schedule.time_schedule,
        ),
        evaluation=CaptionEvaluation(trained=options.samples, held_out=options.samples),
        parallel=options.parallel,
        log_every=options.log_every,
        save_every=options.save_every,
    )


def read_open_parts(folder: str | os.PathLike) -> PipelineParts:
    """Read the configs of a folder in diffusers' layout, and check its weights by the headers of their files.

    Raises:
      MissingError: If the folder does not exist, or lacks parts or files.
      UserError: If the pipeline or the model cannot be trained here, settings are unsupported, or weights do not fit.
    """
    folder = Path(folder)
    if (family := find_family(folder)) is None:
        raise MissingError(f"no such file: {folder / INDEX}")
    parts = family.read_parts(folder)
    family.check_weights(folder, text=parts.text, image_encoder=parts.image_encoder, boundary=parts.boundary)
    return parts


def make_data_config(
    parts: PipelineParts, *, max_pixels: int | None, max_frames: int | None, **fields: Any
) -> DataConfig:
    """Return the config of clips of at most these sizes, which are the family's own where they are None."""
    size = parts.size
    return DataConfig(
        max_pixels=size.h * size.w if max_pixels is None else max_pixels,
        max_frames=size.t if max_frames is None else max_frames,
        **fields,
    )


def make_row_shape(data: DataConfig, parts: PipelineParts) -> PackedShape:
    """Return the shape of rows that hold one clip of the largest size, or several smaller ones."""
    tokens = data.count_max_clip_tokens(stride=parts.autoencoder.stride, patch=parts.denoiser.patch)
    return PackedShape(tokens=tokens, text=2 * parts.text.max_tokens, segments=_MAX_CLIPS_PER_ROW)


def _select_weights(
    folder: Path, boundary: float | None, options: FineTuningOptions
) -> AllWeights | TemporalWeights | LoraAdapters:
    """Return what is trained, from the folder's weights unless they are trained from scratch."""
    weights, expert = _select_expert(folder, boundary, options)
    start = os.fspath(weights)
    if options.train == "lora":
        return LoraAdapters(init_from=start, lora=options.lora, expert=expert)
    if options.train == "temporal":
        return TemporalWeights(init_from=start, expert=expert)
    return AllWeights(init_from=start if options.train == "full" else None, expert=expert)


def _select_expert(
    folder: Path, boundary: float | None, options: FineTuningOptions
) -> tuple[Path, ExpertConfig | None]:
    """Return the folder of the weights that are trained, and the config of their expert if the model has two."""
    if boundary is None:
        if options.expert is not None:
            raise UserError(f"expert={options.expert} is invalid: {folder} has one transformer; leave out expert")
        return folder, None
    if options.expert is None:
        fix = f"set expert=high, for times from {boundary} on, or expert=low"
        raise UserError(f"{folder} has two experts, which are trained one at a time; {fix}")
    high, low = folder / "transformer", folder / "transformer_2"
    start, other = (high, low) if options.expert == "high" else (low, high)
    return start, ExpertConfig(expert=options.expert, boundary=boundary, other_folder=os.fspath(other))


def _make_frame_conditioning(options: FineTuningOptions, parts: PipelineParts) -> FrameConditioning | None:
    prob = options.first_frame_prob
    if parts.frame_conditioning is None and prob is not None:
        raise UserError("first_frame_prob is invalid: this model is trained without FrameConditioning; leave it out")
    if parts.frame_conditioning is None or prob is None:
        return parts.frame_conditioning
    return replace(parts.frame_conditioning, prob=prob)
