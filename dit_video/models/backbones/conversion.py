"""Model surgery: extensions of trained denoisers that leave the predictions unchanged until they are trained."""

import dataclasses
from typing import Any

from jaxtyping import Array

from dit_video.core.errors import UserError
from dit_video.core.trees import unflatten
from dit_video.models.backbones.dit import DiTConfig
from dit_video.models.backbones.protocol import ConfigT
from dit_video.models.backbones.spatio_temporal import SpatioTemporalDiTConfig, TemporalLayers
from dit_video.nn import check_params, complete_params
from dit_video.nn.attention import Full, SpaceOnly


def add_temporal_layers(
    config: DiTConfig, params: dict[str, Any], temporal: TemporalLayers, key: Array
) -> tuple[SpatioTemporalDiTConfig, dict[str, Any]]:
    """Extend an image model to a video model, which predicts every frame as the image model does until it is trained.

    Spatial layers process each frame as an image; only the temporal layers depend on time. To train these alone, as in
    Kandinsky Video (arXiv 2311.13073, section 3.2), set the optimizer's `trainable=("temporal",)`.

    Args:
      config: Config of an image model.
      params: Parameters of that model, which the result shares.
      temporal: Config of the temporal layers.
      key: Random key for the parameters of the temporal layers.

    Raises:
      UserError: If the model has a pattern other than `Full` or `SpaceOnly`, registers or another part that
        `SpatioTemporalDiT` lacks, or the parameters belong to another model.
    """
    if config.pattern not in (Full(), SpaceOnly()):
        raise UserError(
            f"pattern={config.pattern} is invalid: an image model's tokens see their frame. Use a model with Full() or "
            "SpaceOnly()."
        )
    kept = {field.name for field in dataclasses.fields(SpatioTemporalDiTConfig)}
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    for field in dataclasses.fields(config):
        if field.name not in kept | {"pattern"} and values[field.name] != field.default:
            rule = "SpatioTemporalDiT has no such part"
            raise UserError(f"{field.name}={values[field.name]} is invalid: {rule}. Use a model with {field.default}.")
    shared = {name: value for name, value in values.items() if name in kept}
    grown = SpatioTemporalDiTConfig(**shared, temporal=temporal)
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
