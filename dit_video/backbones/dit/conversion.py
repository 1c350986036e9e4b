"""Denoisers made of trained ones, which have more to learn and predict as before until they do."""

import dataclasses
from typing import Any, TypeVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from dit_video.backbones.dit.config import DitConfig, Temporal
from dit_video.backbones.wan.model import WanDitConfig
from dit_video.core.errors import UserError
from dit_video.core.trees import unflatten
from dit_video.nn import checked_params, completed_params
from dit_video.nn.attention import Full, SpaceOnly

Config = TypeVar("Config", DitConfig, WanDitConfig)


def image_to_video(
    config: DitConfig, params: dict[str, Any], temporal: Temporal, key: Array
) -> tuple[DitConfig, dict[str, Any]]:
    """A video model that predicts of every frame what the image model does, until it is trained.

    Spatial layers see one frame each and take it for an image; of time only the temporal layers know. To train these
    alone, as Kandinsky Video does (arXiv 2311.13073, section 3.2), say `trainable=("temporal",)` to the optimizer.

    Args:
      config: of an image model.
      params: its parameters, which the result shares.
      temporal: where the temporal layers are.
      key: for them.

    Raises:
      UserError: a model that has temporal layers, another pattern than `Full` or `SpaceOnly`, registers or joint
        attention; or parameters of another one.
    """
    if config.temporal is not None or config.pattern not in (Full(), SpaceOnly()):
        raise UserError(
            f"a model with the pattern {config.pattern} and temporal={config.temporal} is no image model: "
            "begin with one whose pattern is Full() or SpaceOnly(), without temporal layers"
        )
    grown = dataclasses.replace(config, pattern=SpaceOnly(), temporal=temporal)
    return grown, completed_params(grown.make, checked_params(config.make, params), key)


def with_given(config: Config, params: dict[str, Any], channels: int) -> tuple[Config, dict[str, Any]]:
    """A model that is given `channels` channels of clean latents and masks, and does not heed the new ones yet.

    So a text-to-video model becomes one that animates images: 4 mask channels and 16 latent ones in Wan's.

    Raises:
      UserError: no more channels than there are, or parameters of another model.
    """
    if channels <= config.given_channels:
        raise UserError(f"the model is given {config.given_channels} channels already; {channels} are not more")
    grown = dataclasses.replace(config, given_channels=channels)
    leaves, places = checked_params(config.make, params), config.patch.volume
    if isinstance(config, WanDitConfig):
        leaves["embed/kernel"] = _widened(leaves["embed/kernel"], places, config.channels + channels)
    else:
        old = leaves.get("given/kernel", jnp.zeros((0, config.width), jnp.float32))
        leaves["given/kernel"] = _widened(old, places, channels)
    return grown, unflatten(leaves)


def _widened(kernel: Float[Array, "i D"], places: int, channels: int) -> Float[Array, "o D"]:
    """With zeros for the new channels, which lie behind the old ones at each place of a patch."""
    by_place = jnp.reshape(kernel, (places, -1, kernel.shape[1]))
    return jnp.pad(by_place, ((0, 0), (0, channels - by_place.shape[1]), (0, 0))).reshape(-1, kernel.shape[1])
