"""Requests of clips, and the interface of generation tasks, which make plans for sampling of them."""

import abc
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from dit_video.backbones.protocol import BackboneConfig
from dit_video.conditioning import FrameConditioning
from dit_video.encoders.autoencoder import LatentCodec
from dit_video.encoders.image import FrozenImageEncoder
from dit_video.generation.plan import SamplingPlan
from dit_video.tokens import Grid
from dit_video.video import Clip

Image = Clip | UInt8[np.ndarray, "H W 3"]
"""A clip of one frame, or its pixels."""


@dataclass(frozen=True, kw_only=True)
class TaskModel:
    """Parts of a model that tasks use."""

    backbone: BackboneConfig
    codec: LatentCodec
    frame_conditioning: FrameConditioning | None
    """Conditioning on frames that the denoiser was trained with; None for a model without it."""
    image_encoder_folder: str | None
    """Folder of the image encoder whose tokens it attends to."""

    @functools.cached_property
    def image_encoder(self) -> FrozenImageEncoder:
        """Return the image encoder, which is read when the first image arrives."""
        assert self.image_encoder_folder is not None
        return FrozenImageEncoder(self.image_encoder_folder)


class GenerationTask(abc.ABC):
    """A use of a trained model: what is known of a clip, and how sampling keeps to it.

    A task of one's own is passed to `Pipeline.generate(task=...)`.
    """

    @abc.abstractmethod
    def __call__(self, request: "Request", model: TaskModel) -> SamplingPlan:
        """Return the plan of a request.

        Raises:
          UserError: the request or the model does not fit the task.
        """


class Request(NamedTuple):
    """Request for one clip."""

    prompt: str
    size: Grid | tuple[int, int, int]
    """Frames, height and width in pixels."""
    seed: int = 0
    negative: str = ""
    image: Image | None = None
    """First frame of the clip, in models that accept one."""
    last_image: Image | None = None
    """Last frame of the clip, in models that accept one."""
    conditioning: Mapping[str, Any] = {}
    """Values of further conditioning that the model was trained with, by name; without, it is dropped."""
    strengths: Mapping[str, float] = {}
    """Strengths of further conditioning, by name; 1 by default."""
    task: GenerationTask | None = None
    """Task that the model is used for; None for text to video, or image to video where there is an image."""
