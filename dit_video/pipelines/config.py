"""What a pipeline is made of, and what it is asked for."""

import operator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from dit_video.autoencoders import AutoencoderConfig, latent_grid
from dit_video.backbones.dit import DitConfig
from dit_video.backbones.wan import WanDitConfig
from dit_video.core.errors import UserError
from dit_video.diffusion import Prediction, Process, Velocity
from dit_video.evaluation.config import CaptionEvaluation, Evaluation
from dit_video.generation import Sampling
from dit_video.nn import param_shapes
from dit_video.text import ClassNamesConfig, TextConfig
from dit_video.tokens import Grid, RowShape, token_grid
from dit_video.video import Clip

Image = Clip | UInt8[np.ndarray, "H W 3"]
"""A clip of one frame, or its pixels."""


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """What a pipeline is made of, besides its weights.

    Raises:
      UserError: a boundary that is no time, a prediction that a model of the process can't make, or a denoiser of other
        classes than the captions.
    """

    autoencoder: AutoencoderConfig
    dit: DitConfig | WanDitConfig
    text: TextConfig
    """of a frozen encoder with its folder and identity: its weights are no part of the pipeline"""
    process: Process
    rows: RowShape | None
    """of the rows that the denoiser was trained on; None: every clip has a row to itself, of its own length"""
    batch: int
    """rows that are sampled at once"""
    sampling: Sampling
    fps: float
    """of the clips that it was trained on"""
    size: Grid
    """what is generated if nothing else is asked for: frames, height, width"""
    prediction: Prediction = field(default_factory=Velocity)
    """what the denoiser was trained to predict"""
    caption_dropout: float | None = None
    """share of captions that were left out in training, so that guidance knows what none is; None if unknown"""
    boundary: float | None = None
    """of two experts (Wan 2.2 A14B): at times from it on `dit` denoises, below it a second model of the same config"""
    image_encoder: str | None = None
    """folder of the frozen CLIP whose image tokens the denoiser attends to, in models that animate images with one"""
    evaluation: Evaluation = field(default_factory=CaptionEvaluation)
    made_by: dict[str, str] = field(default_factory=dict)
    """the command, seed and versions that the weights come from"""

    def __post_init__(self):
        if self.boundary is not None and not 0 <= self.boundary <= 1:
            raise UserError(f"the boundary between two experts is a time from 0 to 1, not {self.boundary}")
        self.prediction.check(self.process)
        check_classes(self.text, self.dit)

    @property
    def interval(self) -> float:
        """Of two tokens along time, in what the denoiser's coordinates count."""
        if self.dit.clock == "tokens":
            return 1.0
        return self.autoencoder.stride.t * self.dit.patch.t / self.fps

    @property
    def row_shape(self) -> RowShape:
        """Of the rows that are sampled; a clip that is larger has a row to itself."""
        return self.rows or RowShape(tokens=1, text=self.text.max_tokens, segments=1)

    @property
    def denoiser_shapes(self) -> dict[str, Any]:
        """The shapes of the denoiser's parameters."""
        experts = ("dit",) if self.boundary is None else ("dit", "low_noise")
        return {name: param_shapes(self.dit.make) for name in experts} | {"text": param_shapes(self.text.make)}

    def latent_grid(self, size: Grid) -> Grid:
        """The latents' size of a clip that the model can make.

        Raises:
          UserError: another size, with the nearest that it can make.
        """
        stride, patch = self.autoencoder.stride, self.dit.patch
        for name, length, step, pixels_, latents in (
            ("height", size.h, stride.h * patch.h, stride.h, patch.h),
            ("width", size.w, stride.w * patch.w, stride.w, patch.w),
        ):
            if length < 1 or length % step:
                below = max(step, length - length % step)
                raise UserError(
                    f"{name} {length} is not divisible by {step} (the autoencoder's stride {pixels_} times the patch "
                    f"{latents}); use {below} or {below + step}"
                )
        grid = latent_grid(size, stride)
        token_grid(grid, patch)
        return grid


def check_classes(text: TextConfig, dit: DitConfig | WanDitConfig) -> None:
    """That captions are classes where the denoiser has labels, and as many.

    Raises:
      UserError: they are not.
    """
    named = text.classes if isinstance(text, ClassNamesConfig) else 0
    labels = dit.labels.classes if isinstance(dit, DitConfig) and dit.labels is not None else 0
    if named != labels:
        raise UserError(
            f"captions are of {named} classes, the denoiser's labels of {labels}; with classes, "
            "text=ClassNamesConfig(classes=...) and dit labels=ClassLabels(classes=...) have one number"
        )


class Request(NamedTuple):
    """One clip to be made."""

    prompt: str
    size: Grid | tuple[int, int, int]
    """frames, height, width in pixels"""
    seed: int = 0
    negative: str = ""
    image: Image | None = None
    """what it begins with, in models that take one"""
    last_image: Image | None = None
    """what it ends with, in those that take that too"""


def as_grid(size: Any) -> Grid:
    """A size that a person gave."""
    try:
        return Grid(*map(operator.index, size))
    except TypeError as error:
        raise UserError(
            f"a size is three whole numbers, frames, height and width, such as (17, 32, 48), not {size!r}"
        ) from error
