"""Model surgery: extensions of trained denoisers that leave the predictions unchanged until they are trained."""

import dataclasses
from typing import Any

from jaxtyping import Array

from dit_video.core.errors import UserError
from dit_video.core.trees import unflatten
from dit_video.models.backbones.dit import DitConfig, TemporalLayers
from dit_video.models.backbones.protocol import ConfigT
from dit_video.nn import check_params, complete_params
from dit_video.nn.attention import Full, SpaceOnly


def add_temporal_layers(
    config: DitConfig, params: dict[str, Any], temporal: TemporalLayers, key: Array
) -> tuple[DitConfig, dict[str, Any]]:
    """Extend an image model to a video model, which predicts every frame as the image model does until it is trained.

    Spatial layers process each frame as an image; only the temporal layers depend on time. To train these alone, as in
    Kandinsky Video (arXiv 2311.13073, section 3.2), set the optimizer's `trainable=("temporal",)`.

    Args:
      config: Config of an image model.
      params: Parameters of that model, which the result shares.
      temporal: Config of the temporal layers.
      key: Random key for the parameters of the temporal layers.

    Raises:
      UserError: If the model has temporal layers, a pattern other than `Full` or `SpaceOnly`, registers or joint
        attention, or the parameters belong to another model.
    """
    if config.temporal is not None or config.pattern not in (Full(), SpaceOnly()):
        raise UserError(
            f"a model with pattern={config.pattern} and temporal={config.temporal} is not an image model; "
            "use one with pattern Full() or SpaceOnly(), and without temporal layers"
        )
    grown = dataclasses.replace(config, pattern=SpaceOnly(), temporal=temporal)
    return grown, complete_params(grown.make, check_params(config.make, params), key)


def add_cond_channels(config: ConfigT, params: dict[str, Any], channels: int) -> tuple[ConfigT, dict[str, Any]]:
    """Extend a model to `channels` channels of clean latents and masks, with zero weights for the new ones.

    This turns a text-to-video model into an image-to-video model; Wan's have 4 mask channels and 16 latent channels.

    Raises:
      UserError: If the model has this many channels already, or the parameters belong to another model.
    """
    if channels <= config.cond_channels:
        raise UserError(f"channels={channels} does not extend a model with {config.cond_channels}; give more channels")
    leaves = config.widen_conditioning(check_params(config.make, params), channels)
    return config.replace(cond_channels=channels), unflatten(leaves)
