"""Parts of a pipeline without their weights, for plans and checks of requests: latents and image tokens are zero."""

import functools
from typing import Any

import numpy as np
from jaxtyping import Float32

from dit_video.data.latents.codec import LatentCodec
from dit_video.models.autoencoders import latent_grid
from dit_video.sampling.parts import make_task_model
from dit_video.sampling.pipeline_config import PipelineConfig
from dit_video.sampling.request import TaskModel
from dit_video.tokens import Grid
from dit_video.weights import read_clip_vision_config


class EmptyCodec(LatentCodec):
    """A codec without weights, whose latents are zero."""

    def encode_pixels(self, pixels: np.ndarray) -> Float32[np.ndarray, "t h w c"]:
        grid = latent_grid(Grid(*pixels.shape[:3]), self.config.stride)
        return np.zeros((*grid, self.config.channels), np.float32)


class EmptyImageEncoder:
    """An image encoder without weights, whose tokens are zero."""

    def __init__(self, folder: str):
        config = read_clip_vision_config(folder)
        self.shape = config.tokens, config.width

    def __call__(self, frames: np.ndarray) -> Float32[np.ndarray, "T i F"]:
        """Return the tokens of each frame."""
        return np.zeros((len(frames), *self.shape), np.float32)


class EmptyTaskModel(TaskModel):
    """Parts of a model that tasks use, without weights."""

    @functools.cached_property
    def image_encoder(self) -> Any:
        assert self.image_encoder_folder is not None
        return EmptyImageEncoder(self.image_encoder_folder)


def make_empty_task_model(config: PipelineConfig) -> EmptyTaskModel:
    """Return what generation tasks use of a pipeline, without weights."""
    return EmptyTaskModel(**vars(make_task_model(config, EmptyCodec(config.autoencoder, {}))))
