"""Autoencoders of images: diffusers' `AutoencoderKL` (Stable Diffusion, FLUX).

Other classes of diffusers with these networks share the maps of encoder and decoder; their decoder may have other
norms.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dit_video.autoencoders import ImageLevels, ImageVaeConfig
from dit_video.core.errors import UserError
from dit_video.nn import param_shapes
from dit_video.weights import diffusers
from dit_video.weights.diffusers import DENSE, DENSE_PICTURE, PICTURE, both
from dit_video.weights.tensor_mapping import SHARD_BYTES, Foreign, Names

CLASS = "AutoencoderKL"
_DOWN, _UP = "EncoderBlock2D", "DecoderBlock2D"
_OLDER = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
"""Names of attention's linear maps in diffusers before 2023, which it still reads."""
_DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
    "block_out_channels": [64],
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 32,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "force_upcast": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}


def load(folder: Path, document: dict[str, Any]) -> tuple[ImageVaeConfig, dict[str, Any]]:
    """Read the config and parameters of a folder, whose config file is `document`.

    `sample_size` and `force_upcast`, which control diffusers' tiling and rounding, are ignored.

    Raises:
      MissingError: files are missing.
      UserError: a setting is not supported, or the weights do not fit.
    """
    settings = diffusers.settings(folder, document, _DEFAULTS)
    config = ImageVaeConfig(
        channels=settings["latent_channels"],
        levels=levels_of(folder, settings),
        moments=settings["use_quant_conv"],
        latents=settings["use_post_quant_conv"],
    )
    shapes = param_shapes(config.make)
    del shapes["normalizer"]
    params = diffusers.read(folder, as_found(folder, _names(config)), shapes)
    return config, params | {"normalizer": normalizer_of(folder, settings, config.channels)}


def save(
    folder: str | os.PathLike, config: ImageVaeConfig, params: dict[str, Any], *, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write a config and parameters as a folder; the inverse of `load`."""
    document = {
        "_class_name": CLASS,
        **settings_of(config.levels),
        "latent_channels": config.channels,
        "use_quant_conv": config.moments,
        "use_post_quant_conv": config.latents,
        **scales_of(params["normalizer"]),
    }
    diffusers.write(folder, document, _names(config), params, shard_bytes=shard_bytes)


def levels_of(folder: Path, given: Mapping[str, Any]) -> ImageLevels:
    """Return the levels of encoder and decoder for a folder's settings.

    Raises:
      UserError: a kind of block is not supported, or the decoder's kinds differ from the encoder's.
    """
    diffusers.check_fixed(folder, given, {"in_channels": 3, "out_channels": 3, "act_fn": "silu"})
    count = len(given["block_out_channels"])
    down, up = list(given["down_block_types"]), list(given["up_block_types"])
    attention = tuple(level for level, kind in enumerate(down) if kind == f"AttnDown{_DOWN}")
    supported = _blocks(count, attention)
    diffusers.check_fixed(folder, {"down_block_types": down, "up_block_types": up}, supported)
    return ImageLevels(
        widths=tuple(given["block_out_channels"]),
        blocks=given["layers_per_block"],
        groups=given["norm_num_groups"],
        middle_attention=given["mid_block_add_attention"],
        attention=attention,
    )


def settings_of(levels: ImageLevels) -> dict[str, Any]:
    """Return the settings of levels; the inverse of `parse_levels`."""
    return {
        "in_channels": 3,
        "out_channels": 3,
        "act_fn": "silu",
        **_blocks(len(levels.widths), levels.attention),
        "block_out_channels": list(levels.widths),
        "layers_per_block": levels.blocks,
        "norm_num_groups": levels.groups,
        "mid_block_add_attention": levels.middle_attention,
    }


def _blocks(count: int, attention: tuple[int, ...]) -> dict[str, list[str]]:
    """Return the settings with the kinds of the levels' blocks."""
    kinds = ["Attn" if level in attention else "" for level in range(count)]
    return {
        "down_block_types": [f"{kind}Down{_DOWN}" for kind in kinds],
        "up_block_types": [f"{kind}Up{_UP}" for kind in kinds[::-1]],
    }


class NormNames(NamedTuple):
    """Names of a kind of norm in diffusers."""

    attention: str
    """Name of the norm inside attention."""
    parts: Mapping[str, tuple[str, str]]
    """Name and einops pattern in diffusers of each of our parameters."""

    def at(self, ours: str, theirs: str) -> dict[str, Foreign]:
        """Return the tensor map of one norm."""
        return {
            f"{ours}/{param}": Foreign(f"{theirs}.{name}", pattern) for param, (name, pattern) in self.parts.items()
        }


GROUP_NORM = NormNames("group_norm", {"scale": ("weight", ""), "shift": ("bias", "")})


def encoder_names(levels: ImageLevels) -> dict[str, Foreign]:
    """Return the tensor map of an `ImageEncoder` in diffusers."""
    names = _ends("encoder", GROUP_NORM)
    for level in range(len(levels.widths)):
        ours, theirs = f"encoder/levels/{level}", f"encoder.down_blocks.{level}"
        names |= _level(ours, theirs, levels.blocks, GROUP_NORM)
        names |= both(f"{ours}/down/space", f"{theirs}.downsamplers.0.conv", PICTURE)
    return names


def decoder_names(levels: ImageLevels, norm: NormNames) -> dict[str, Foreign]:
    """Return the tensor map of an `ImageDecoder` in diffusers, with a kind of norm."""
    names = _ends("decoder", norm)
    for level in range(len(levels.widths)):
        ours, theirs = f"decoder/levels/{level}", f"decoder.up_blocks.{level}"
        names |= _level(ours, theirs, levels.blocks + 1, norm)
        names |= both(f"{ours}/up/space", f"{theirs}.upsamplers.0.conv", PICTURE)
    return names


def as_found(folder: Path, names: Names) -> Names:
    """Return a tensor map with the names that a folder uses for attention's linear maps, older or current."""
    if not any(name.endswith(".proj_attn.weight") for name in diffusers.tensor_names(folder)):
        return names

    def older(name: str) -> str:
        for new, old in _OLDER.items():
            name = name.replace(f".{new}.", f".{old}.")
        return name

    return {path: foreign._replace(name=older(foreign.name)) for path, foreign in names.items()}


def _names(config: ImageVaeConfig) -> Names:
    names = encoder_names(config.levels) | decoder_names(config.levels, GROUP_NORM)
    names |= both("moments", "quant_conv", DENSE_PICTURE)
    return names | both("latents", "post_quant_conv", DENSE_PICTURE)


def _ends(side: str, norm: NormNames) -> dict[str, Foreign]:
    """Return the tensor map of the first and last layers, and of the middle block."""
    names = both(f"{side}/conv_in", f"{side}.conv_in", PICTURE) | both(f"{side}/conv_out", f"{side}.conv_out", PICTURE)
    names |= norm.at(f"{side}/norm", f"{side}.conv_norm_out")
    ours, theirs = f"{side}/middle", f"{side}.mid_block"
    names |= _residual(f"{ours}/before", f"{theirs}.resnets.0", norm)
    names |= _residual(f"{ours}/after", f"{theirs}.resnets.1", norm)
    return names | _attention(f"{ours}/attention", f"{theirs}.attentions.0", norm)


def _level(ours: str, theirs: str, blocks: int, norm: NormNames) -> dict[str, Foreign]:
    names: dict[str, Foreign] = {}
    for block in range(blocks):
        names |= _residual(f"{ours}/blocks/{block}", f"{theirs}.resnets.{block}", norm)
        names |= _attention(f"{ours}/attentions/{block}", f"{theirs}.attentions.{block}", norm)
    return names


def _residual(ours: str, theirs: str, norm: NormNames) -> dict[str, Foreign]:
    names = both(f"{ours}/conv_in", f"{theirs}.conv1", PICTURE) | both(f"{ours}/conv_out", f"{theirs}.conv2", PICTURE)
    names |= norm.at(f"{ours}/norm_in", f"{theirs}.norm1") | norm.at(f"{ours}/norm_out", f"{theirs}.norm2")
    return names | both(f"{ours}/shortcut", f"{theirs}.conv_shortcut", DENSE_PICTURE)


def _attention(ours: str, theirs: str, norm: NormNames) -> dict[str, Foreign]:
    names = norm.at(f"{ours}/norm", f"{theirs}.{norm.attention}")
    for linear, name in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("out", "to_out.0")):
        names |= both(f"{ours}/{linear}", f"{theirs}.{name}", DENSE)
    return names


def normalizer_of(folder: Path, given: Mapping[str, Any], channels: int) -> dict[str, np.ndarray]:
    """Return the mean and the standard deviation of each channel, from a folder's settings.

    Diffusion models see `(latents - mean) * scaling_factor / latents_std`. The settings have either a scalar mean
    (`shift_factor`) and no deviations, or both of them per channel.

    Raises:
      UserError: the settings contradict each other, or don't fit the channels.
    """
    scale = given["scaling_factor"]
    mean, std, shift = given["latents_mean"], given["latents_std"], given["shift_factor"]
    if (mean is None) != (std is None) or (mean is not None and shift is not None):
        raise UserError(
            f"{folder / 'config.json'}: use both latents_mean and latents_std without shift_factor, or neither of them"
        )
    if not scale:
        raise UserError(f"{folder / 'config.json'}: scaling_factor={scale} is invalid: it must not be zero")
    mean = np.asarray([shift or 0.0] * channels if mean is None else mean, np.float64)
    std = np.asarray([1.0] * channels if std is None else std, np.float64) / scale
    if not mean.shape == std.shape == (channels,):
        raise UserError(
            f"{folder / 'config.json'}: latents_mean has {mean.size} and latents_std {std.size} values for {channels} "
            "channels"
        )
    return {"mean": mean.astype(np.float32), "std": std.astype(np.float32)}


def scales_of(normalizer: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a normalizer; the inverse of `parse_normalizer`.

    Values are the shortest decimals that round to the same float32.
    """
    mean, std = (np.asarray(normalizer[name], np.float32) for name in ("mean", "std"))
    if len(np.unique(mean)) > 1 or len(np.unique(std)) > 1:
        values = {"latents_mean": mean, "latents_std": std}
        return {"scaling_factor": 1.0} | {key: [diffusers.decimal(x) for x in array] for key, array in values.items()}
    scales = (float(f"{1 / float(std[0]):.{digits}g}") for digits in range(1, 18))
    scale = next(scale for scale in scales if np.float32(1 / scale) == std[0])
    return {"scaling_factor": scale, "shift_factor": diffusers.decimal(mean[0]) if mean[0] else None}
