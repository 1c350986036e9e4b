"""Autoencoders of images: diffusers' `AutoencoderKL` (Stable Diffusion, FLUX).

Other diffusers classes with these networks share the maps of the encoder and the decoder; their decoders may have other
norms.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from dit_video.core.errors import UserError
from dit_video.families.autoencoder_format import AutoencoderFormat
from dit_video.models.autoencoders import ImageLevels, ImageVaeConfig
from dit_video.weights import folders
from dit_video.weights.folders import CONV_1X1, CONV_2D, map_kernel_and_bias, map_linear
from dit_video.weights.tensor_map import TensorMap, TensorMapping

_DOWN, _UP = "EncoderBlock2D", "DecoderBlock2D"
DEFAULTS: dict[str, Any] = {
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
    "mid_block_add_attention": True,
}
"""Settings of the classes with these networks, with the defaults of `AutoencoderKL`."""
_DEFAULTS = DEFAULTS | {"use_quant_conv": True, "use_post_quant_conv": True}


def parse_config(folder: Path, settings: Mapping[str, Any]) -> ImageVaeConfig:
    """Return the config for a folder's settings.

    `sample_size` and `force_upcast`, which control diffusers' tiling and rounding, are ignored.

    Raises:
      UserError: If a setting is not supported.
    """
    return ImageVaeConfig(
        channels=settings["latent_channels"],
        levels=parse_levels(folder, settings),
        use_quant_conv=settings["use_quant_conv"],
        use_post_quant_conv=settings["use_post_quant_conv"],
    )


def make_document(config: ImageVaeConfig, params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a config and its normalizer; the inverse of `parse_config`."""
    return {
        **make_level_settings(config.levels),
        "latent_channels": config.channels,
        "use_quant_conv": config.use_quant_conv,
        "use_post_quant_conv": config.use_post_quant_conv,
        **make_normalizer_settings(params["normalizer"]),
    }


def parse_levels(folder: Path, settings: Mapping[str, Any]) -> ImageLevels:
    """Return the levels of encoder and decoder for a folder's settings.

    Raises:
      UserError: If a kind of block is not supported, or the decoder's kinds differ from the encoder's.
    """
    folders.check_supported(folder, settings, {"in_channels": 3, "out_channels": 3, "act_fn": "silu"})
    count = len(settings["block_out_channels"])
    down, up = list(settings["down_block_types"]), list(settings["up_block_types"])
    attention = tuple(level for level, kind in enumerate(down) if kind == f"AttnDown{_DOWN}")
    supported = _make_block_types(count, attention)
    folders.check_supported(folder, {"down_block_types": down, "up_block_types": up}, supported)
    return ImageLevels(
        widths=tuple(settings["block_out_channels"]),
        blocks=settings["layers_per_block"],
        groups=settings["norm_num_groups"],
        middle_attention=settings["mid_block_add_attention"],
        attention=attention,
    )


def make_level_settings(levels: ImageLevels) -> dict[str, Any]:
    """Return the settings of levels; the inverse of `parse_levels`."""
    return {
        "in_channels": 3,
        "out_channels": 3,
        "act_fn": "silu",
        **_make_block_types(len(levels.widths), levels.attention),
        "block_out_channels": list(levels.widths),
        "layers_per_block": levels.blocks,
        "norm_num_groups": levels.groups,
        "mid_block_add_attention": levels.middle_attention,
    }


def _make_block_types(count: int, attention: tuple[int, ...]) -> dict[str, list[str]]:
    """Return the settings with the kinds of the levels' blocks."""
    kinds = ["Attn" if level in attention else "" for level in range(count)]
    down, up = [f"{kind}Down{_DOWN}" for kind in kinds], [f"{kind}Up{_UP}" for kind in kinds[::-1]]
    return {"down_block_types": down, "up_block_types": up}


class NormMapping(NamedTuple):
    """Names of a kind of norm in diffusers."""

    attention_name: str
    """Name of the norm inside attention."""
    params: Mapping[str, tuple[str, str]]
    """diffusers' name and einops pattern for each of our parameters."""

    def make_tensor_map(self, ours: str, theirs: str) -> dict[str, TensorMapping]:
        """Return the tensor map of one norm."""
        return {
            f"{ours}/{param}": TensorMapping(f"{theirs}.{name}", pattern)
            for param, (name, pattern) in self.params.items()
        }


GROUP_NORM = NormMapping("group_norm", {"scale": ("weight", ""), "shift": ("bias", "")})


def map_side(side: Literal["encoder", "decoder"], levels: ImageLevels, norm: NormMapping) -> dict[str, TensorMapping]:
    """Return the tensor map of an `ImageEncoder` or an `ImageDecoder` in diffusers."""
    direction, blocks = ("down", levels.blocks) if side == "encoder" else ("up", levels.blocks + 1)
    names = _map_ends(side, norm)
    for level in range(len(levels.widths)):
        ours, theirs = f"{side}/levels/{level}", f"{side}.{direction}_blocks.{level}"
        for block in range(blocks):
            names |= _map_residual(f"{ours}/blocks/{block}", f"{theirs}.resnets.{block}", norm)
            names |= _map_attention(f"{ours}/attentions/{block}", f"{theirs}.attentions.{block}", norm)
        names |= map_kernel_and_bias(f"{ours}/{direction}/space", f"{theirs}.{direction}samplers.0.conv", CONV_2D)
    return names


def make_tensor_map(config: ImageVaeConfig) -> TensorMap:
    """Return the tensor map of diffusers' `AutoencoderKL`."""
    names = map_side("encoder", config.levels, GROUP_NORM) | map_side("decoder", config.levels, GROUP_NORM)
    names |= map_kernel_and_bias("moments", "quant_conv", CONV_1X1)
    return names | map_kernel_and_bias("latents", "post_quant_conv", CONV_1X1)


def _map_ends(side: str, norm: NormMapping) -> dict[str, TensorMapping]:
    """Return the tensor map of the first and last layers, and of the middle block."""
    names = map_kernel_and_bias(f"{side}/conv_in", f"{side}.conv_in", CONV_2D)
    names |= map_kernel_and_bias(f"{side}/conv_out", f"{side}.conv_out", CONV_2D)
    names |= norm.make_tensor_map(f"{side}/norm", f"{side}.conv_norm_out")
    ours, theirs = f"{side}/middle", f"{side}.mid_block"
    names |= _map_residual(f"{ours}/before", f"{theirs}.resnets.0", norm)
    names |= _map_residual(f"{ours}/after", f"{theirs}.resnets.1", norm)
    return names | _map_attention(f"{ours}/attention", f"{theirs}.attentions.0", norm)


def _map_residual(ours: str, theirs: str, norm: NormMapping) -> dict[str, TensorMapping]:
    names = map_kernel_and_bias(f"{ours}/conv_in", f"{theirs}.conv1", CONV_2D)
    names |= map_kernel_and_bias(f"{ours}/conv_out", f"{theirs}.conv2", CONV_2D)
    names |= norm.make_tensor_map(f"{ours}/norm_in", f"{theirs}.norm1")
    names |= norm.make_tensor_map(f"{ours}/norm_out", f"{theirs}.norm2")
    return names | map_kernel_and_bias(f"{ours}/shortcut", f"{theirs}.conv_shortcut", CONV_1X1)


def _map_attention(ours: str, theirs: str, norm: NormMapping) -> dict[str, TensorMapping]:
    names = norm.make_tensor_map(f"{ours}/norm", f"{theirs}.{norm.attention_name}")
    layers = {"query": "to_q", "key": "to_k", "value": "to_v", "out": "to_out.0"}
    return names | map_linear({f"{ours}/{path}": f"{theirs}.{name}" for path, name in layers.items()})


def parse_normalizer(folder: Path, settings: Mapping[str, Any], channels: int) -> dict[str, np.ndarray]:
    """Return the mean and the standard deviation of each channel, from a folder's settings.

    Diffusion models see `(latents - mean) * scaling_factor / latents_std`. The settings have either a scalar mean
    (`shift_factor`) and no deviations, or both of them per channel.

    Raises:
      UserError: If the settings contradict each other, or don't fit the channels.
    """
    file, scale = folder / "config.json", settings["scaling_factor"]
    mean, std, shift = settings["latents_mean"], settings["latents_std"], settings["shift_factor"]
    if (mean is None) != (std is None) or (mean is not None and shift is not None):
        raise UserError(f"{file}: use both latents_mean and latents_std without shift_factor, or neither of them")
    if not scale:
        raise UserError(f"{file}: scaling_factor={scale} is invalid: it must not be zero")
    mean = np.asarray([shift or 0.0] * channels if mean is None else mean, np.float64)
    std = np.asarray([1.0] * channels if std is None else std, np.float64) / scale
    if not mean.shape == std.shape == (channels,):
        raise UserError(f"{file}: latents_mean has {mean.size}, latents_std {std.size} values for {channels} channels")
    return {"mean": mean.astype(np.float32), "std": std.astype(np.float32)}


def make_normalizer_settings(normalizer: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a normalizer; the inverse of `parse_normalizer`.

    Values are the shortest decimals that round to the same float32.
    """
    mean, std = (np.asarray(normalizer[name], np.float32) for name in ("mean", "std"))
    if len(np.unique(mean)) > 1 or len(np.unique(std)) > 1:
        values = {"latents_mean": mean, "latents_std": std}
        decimals = {key: [folders.compute_shortest_decimal(x) for x in array] for key, array in values.items()}
        return {"scaling_factor": 1.0} | decimals
    scales = (float(f"{1 / float(std[0]):.{digits}g}") for digits in range(1, 18))
    scale = next(scale for scale in scales if np.float32(1 / scale) == std[0])
    return {"scaling_factor": scale, "shift_factor": folders.compute_shortest_decimal(mean[0]) if mean[0] else None}


FORMAT = AutoencoderFormat(
    "AutoencoderKL", ImageVaeConfig, _DEFAULTS, parse_config, make_tensor_map, parse_normalizer, make_document
)
