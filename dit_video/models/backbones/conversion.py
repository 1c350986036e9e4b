"""Model surgery: trained denoisers grow by parts that leave their predictions unchanged until these are trained."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from dit_video.core.errors import UserError
from dit_video.models.backbones.controlled_dit import ControlledDiTConfig
from dit_video.models.backbones.dit import DiTConfig
from dit_video.models.backbones.protocol import BackboneConfig
from dit_video.models.backbones.spatio_temporal import SpatioTemporalDiTConfig, TemporalLayers
from dit_video.nn import check_params, complete_params
from dit_video.nn.attention import Full, SpaceOnly


def grow(config: BackboneConfig, params: dict[str, Any], target: BackboneConfig, key: Array) -> dict[str, Any]:
    """Return the parameters of a trained model that has grown to `target`, whose predictions are the same at first.

    Weights of new channels are zero, new temporal layers are the identity, and a new control stack copies the first
    blocks. Weights of new conditioning are as a new model has them: by default zero, too.

    Args:
      config: Config of the trained model.
      params: Its parameters, which the result shares.
      target: What the model can grow to, by `grow_config`.
      key: Random key for new parameters.

    Raises:
      UserError: If the parameters belong to another model, or it cannot grow to one whose parameters have other shapes.
    """
    leaves = check_params(config.make, params)
    if isinstance(target, ControlledDiTConfig) and not isinstance(config, ControlledDiTConfig):
        blocks = {path: leaf for path, leaf in leaves.items() if path.startswith("blocks/")}
        leaves |= {f"control/{path}": jnp.array(leaf[: target.control_layers]) for path, leaf in blocks.items()}
    if target.cond_channels > config.cond_channels:
        leaves = config.widen_conditioning(leaves, target.cond_channels)
    grown = complete_params(target.make, leaves, key)
    check_params(target.make, grown)
    return grown


def grow_config(config: BackboneConfig, target: BackboneConfig) -> BackboneConfig:
    """Return what a trained model can grow to on the way to another one: `target` itself if it can grow to it.

    A model grows by temporal layers (`add_temporal_layers`), channels of clean latents and masks, conditioning on
    further fields of clips, a control stack, and a time per token. In all else the result is as the trained model.

    Raises:
      UserError: If `target` has temporal layers that cannot be added.
    """
    grown = config
    if isinstance(target, SpatioTemporalDiTConfig) and not isinstance(config, SpatioTemporalDiTConfig):
        grown = _add_temporal_layers(config, target.temporal)
    if type(config) is DiTConfig and isinstance(target, ControlledDiTConfig):
        own = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
        own |= {"conditioning": target.conditioning, "control_layers": target.control_layers}
        grown = ControlledDiTConfig(**own)
    if type(grown) is not type(target):
        return grown
    changes: dict[str, Any] = {}
    if target.cond_channels > grown.cond_channels:
        changes["cond_channels"] = target.cond_channels
    if target.conditioning[: len(grown.conditioning)] == grown.conditioning != target.conditioning:
        changes["conditioning"] = target.conditioning
    if (grown.time, target.time) == ("segment", "token"):
        changes["time"] = "token"
    return grown.replace(**changes) if changes else grown


def add_temporal_layers(config: BackboneConfig, *, spatial_layers: int = 1, layers: int = 1) -> BackboneConfig:
    """Return the config of an image model with temporal layers, which alone depend on time.

    Spatial layers then process each frame as an image (Kandinsky Video, arXiv 2311.13073, section 3.2).

    Args:
      config: Config of a `DiT`.
      spatial_layers: Number of its layers in each group that temporal layers follow.
      layers: Number of temporal layers after each group.

    Raises:
      UserError: If the model is of another class, has a pattern other than `Full` or `SpaceOnly`, registers or another
        part that `SpatioTemporalDiT` lacks, or the groups do not divide its layers.
    """
    return _add_temporal_layers(config, TemporalLayers(spatial_layers=spatial_layers, layers=layers))


def _add_temporal_layers(config: BackboneConfig, temporal: TemporalLayers) -> SpatioTemporalDiTConfig:
    if type(config) is not DiTConfig:
        fix = "Use an image model of DiTConfig, such as DiT or SiT, or train all weights or adapters."
        raise UserError(f"a model of {type(config).__name__} cannot get temporal layers. {fix}")
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
    return SpatioTemporalDiTConfig(**shared, temporal=temporal)
