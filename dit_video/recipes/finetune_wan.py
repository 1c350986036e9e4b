"""Fine-tuning of open weights on clips: the experiment that a folder of Wan gives."""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from dit_video.autoencoders import CausalVaeConfig, latent_grid
from dit_video.backbones.wan import WanDitConfig
from dit_video.conditioning import KnownFrames
from dit_video.core.errors import UserError
from dit_video.diffusion import FlowMatching, LogitNormal
from dit_video.evaluation.config import CaptionEvaluation
from dit_video.experiment import Data, DenoiserTraining, Experiment, GivenAutoencoder, OneOfTwo
from dit_video.families import autoencoder_config, denoiser_config
from dit_video.families.wan.pipeline import checked_index
from dit_video.generation import Sampling
from dit_video.nn import LoraConfig, Remat
from dit_video.text import FrozenTextConfig
from dit_video.tokens import Grid, RowShape
from dit_video.training.optim.optimizer import OptimizerConfig
from dit_video.weights import load_scheduler, text_encoder_config

_RATES = {"lora": 1e-4, "full": 1e-5, "temporal": 1e-5, "scratch": 1e-4}
_CLIPS = 4
"""of a row, at most, that are smaller than the largest"""


@dataclass(frozen=True, kw_only=True)
class FineTuning:
    """How open weights are trained on; what is left out is as the model was made.

    Raises:
      UserError: a learning rate that is not positive.
    """

    train: Literal["lora", "full", "temporal", "scratch"] = "lora"
    """`lora`: adapters alone. `full`: all weights. `temporal`: those of layers in time. `scratch`: all, from random
    weights of the same shapes."""
    expert: Literal["high", "low"] | None = None
    """of a model with two experts (Wan 2.2 A14B) the one that is trained, at its own times: `high`, that of noisy
    times, or `low`"""
    lora: LoraConfig = field(default_factory=lambda: LoraConfig(targets=(r"^dit/blocks/.*kernel$",)))
    steps: int = 1000
    batch: int = 1
    """rows of a step: a row has one of the largest clips, or several smaller ones"""
    learning_rate: float | None = None
    """by default 1e-4 of adapters and from scratch, 1e-5 of weights that are trained already"""
    warmup: int = 50
    max_pixels: int | None = None
    """of a frame; by default 480x832, of TI2V-5B 704x1280"""
    max_frames: int | None = None
    """by default 81, of TI2V-5B 121"""
    fps: float | None = None
    """by default 16, of TI2V-5B 24"""
    stretches: int = 1
    """how many stretches of `max_frames`, spread over its length, are taken of a longer clip"""
    first_frame: float | None = None
    """How often the first frame of a clip is known, so that what follows is learned: of TI2V-5B by default half of the
    time, of I2V always, as there is nothing else that it was trained for. Other models can't be told of one."""
    held_out: tuple[str, ...] = ()
    """names of clips that are not trained on, but reconstructed and reported"""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """of matrix products, and of weights that are not trained"""
    remat: Remat = "full"
    """what is kept for the backward pass; where there is memory for it, `attention` computes much less of long clips
    again"""
    sampling_steps: int = 50
    guidance: float = 5.0
    samples: int = 4
    """how many captions of training clips, and of clips that are held out, are sampled at the end"""
    seed: int = 0
    log_every: int = 20
    save_every: int = 500

    def __post_init__(self):
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise UserError(f"the learning rate {self.learning_rate} must be positive")


def finetuning(folder: str | os.PathLike, options: FineTuning = FineTuning()) -> Experiment:
    """The experiment that trains the transformer of a Wan folder further; its weights are not read yet.

    The autoencoder and the text encoder are used as they are. Prediction, shift, solver and times of sampling are those
    of the folder's scheduler.

    Args:
      folder: in diffusers' layout, with `model_index.json`.
      options: what is trained, how long, and on what sizes.

    Raises:
      MissingError: no such folder, or parts that it lacks.
      UserError: a pipeline or a model that can't be fine-tuned here, settings that aren't known, or options that don't
        fit it.
    """
    folder = Path(folder)
    start, expert = _start(folder, options)
    found = denoiser_config(folder / "transformer")
    if not isinstance(found, WanDitConfig):
        raise UserError(f"{folder / 'transformer'} holds no Wan, which alone can be fine-tuned so; name another folder")
    dit = replace(found, dtype=options.dtype, remat=options.remat)
    autoencoder = autoencoder_config(folder / "vae")
    assert isinstance(autoencoder, CausalVaeConfig)
    schedule = load_scheduler(folder / "scheduler")
    data = _data(options, dit)
    encoder = folder / "text_encoder"
    text = FrozenTextConfig(
        folder=os.fspath(encoder),
        width=text_encoder_config(encoder).width,
        max_tokens=dit.text_length,
        dtype=options.dtype,
        cleaned=True,
    )
    rate = _RATES[options.train] if options.learning_rate is None else options.learning_rate
    return Experiment(
        name=folder.resolve().name,
        seed=options.seed,
        data=data,
        autoencoder=GivenAutoencoder(model=autoencoder, folder=os.fspath(folder / "vae")),
        denoiser=DenoiserTraining(
            dit=dit,
            text=text,
            rows=RowShape(tokens=_largest(data, autoencoder, dit), text=2 * dit.text_length, segments=_CLIPS),
            batch=options.batch,
            optimizer=OptimizerConfig(learning_rate=rate, warmup=min(options.warmup, options.steps - 1)),
            steps=options.steps,
            objective=FlowMatching(process=schedule.process, prediction=schedule.prediction, times=LogitNormal()),
            ema_decay=0.99,
            known=_known(options, dit),
            image_encoder=None if dit.image_width is None else os.fspath(folder / "image_encoder"),
            start=os.fspath(start),
            expert=expert,
            **_trained(options),
        ),
        sampling=Sampling(
            steps=options.sampling_steps, guidance=options.guidance, solver=schedule.solver, grid=schedule.grid
        ),
        evaluation=CaptionEvaluation(trained=options.samples, held_out=options.samples),
        log_every=options.log_every,
        save_every=options.save_every,
    )


def _start(folder: Path, options: FineTuning) -> tuple[Path, OneOfTwo | None]:
    """The folder of the weights that are trained, and which of two experts that is."""
    boundary = checked_index(folder).get("boundary_ratio")
    if boundary is None:
        if options.expert is not None:
            raise UserError(f"{folder} has one transformer for all times; leave out expert")
        return folder, None
    if options.expert is None:
        raise UserError(
            f"{folder} has two experts, which are trained one at a time; say expert=high, for times from {boundary} "
            "on, or expert=low"
        )
    high, low = folder / "transformer", folder / "transformer_2"
    start, other = (high, low) if options.expert == "high" else (low, high)
    return start, OneOfTwo(expert=options.expert, boundary=boundary, other=os.fspath(other))


def _data(options: FineTuning, dit: WanDitConfig) -> Data:
    size, fps = (Grid(121, 704, 1280), 24.0) if dit.time == "token" else (Grid(81, 480, 832), 16.0)
    return Data(
        max_pixels=size.h * size.w if options.max_pixels is None else options.max_pixels,
        max_frames=size.t if options.max_frames is None else options.max_frames,
        fps=fps if options.fps is None else options.fps,
        stretches=options.stretches,
        held_out=options.held_out,
    )


def _largest(data: Data, autoencoder: CausalVaeConfig, dit: WanDitConfig) -> int:
    """Tokens of the largest clip."""
    stride, patch = autoencoder.stride, dit.patch
    side = Grid(1, stride.h * patch.h, stride.w * patch.w)
    return latent_grid(side._replace(t=data.max_frames), stride).t * (data.max_pixels // side.volume)


def _known(options: FineTuning, dit: WanDitConfig) -> KnownFrames | None:
    if dit.time == "token":
        return KnownFrames() if options.first_frame is None else KnownFrames(chance=options.first_frame)
    if dit.given_channels:
        return KnownFrames(chance=1.0 if options.first_frame is None else options.first_frame, rest="grey")
    if options.first_frame is not None:
        raise UserError("this model can't be told of a first frame; leave out first_frame")
    return None


def _trained(options: FineTuning) -> dict[str, Any]:
    if options.train == "lora":
        return {"lora": options.lora}
    return {"trained": options.train}
