"""Wan's autoencoders: diffusers' `AutoencoderKLWan`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dit_video.core.errors import UserError
from dit_video.families.autoencoder_format import AutoencoderFormat
from dit_video.models.autoencoders import CausalVaeConfig
from dit_video.tokens import Grid
from dit_video.weights import folders
from dit_video.weights.folders import CONV_1X1, CONV_2D, map_kernel_and_bias
from dit_video.weights.tensor_map import TensorMapping

CLASS = "AutoencoderKLWan"
_CONV_3D, _CONV_1X1X1 = "o i t h w -> t h w i o", "o i 1 1 1 -> i o"

# Statistics of Wan 2.1's latents (`wan/modules/vae.py` of Wan-Video/Wan2.1), which are diffusers' defaults.
_MEAN = [-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508]
_MEAN += [0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921]
_STD = [2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743]
_STD += [3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160]
_DEFAULTS: dict[str, Any] = {
    "base_dim": 96,
    "decoder_base_dim": None,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
    "dropout": 0.0,
    "latents_mean": _MEAN,
    "latents_std": _STD,
    "is_residual": False,
    "in_channels": 3,
    "out_channels": 3,
    "patch_size": None,
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 8,
}


def parse_normalizer(folder: Path, settings: Mapping[str, Any], channels: int) -> dict[str, np.ndarray]:
    """Return the mean and the standard deviation of each channel, from a folder's settings.

    Raises:
      UserError: If the weights don't fit the channels.
    """
    normalizer = {name: np.asarray(settings[f"latents_{name}"], np.float32) for name in ("mean", "std")}
    for name, values in normalizer.items():
        if values.shape != (channels,):
            count = f"{values.size} values for {channels} channels"
            raise UserError(f"{folder / 'config.json'}: latents_{name} has {count}")
    return normalizer


def make_wan_vae_tensor_map(config: CausalVaeConfig) -> dict[str, TensorMapping]:
    """Return the tensor map of diffusers' `AutoencoderKLWan`."""
    names: dict[str, TensorMapping] = {}
    names |= _map_conv("encoder/conv_in", "encoder.conv_in") | _map_conv("encoder/conv_out", "encoder.conv_out")
    names |= _map_conv("decoder/conv_in", "decoder.conv_in") | _map_conv("decoder/conv_out", "decoder.conv_out")
    names |= map_kernel_and_bias("moments", "quant_conv", _CONV_1X1X1)
    names |= map_kernel_and_bias("latents", "post_quant_conv", _CONV_1X1X1)
    for side in ("encoder", "decoder"):
        names[f"{side}/norm/scale"] = TensorMapping(f"{side}.norm_out.gamma", "d 1 1 1 -> d")
        names |= _map_middle(f"{side}/middle", f"{side}.mid_block")
    offset = 0
    for level in range(len(config.multipliers)):
        # Without shortcuts, diffusers numbers blocks and downsamplers of all levels consecutively.
        ours, theirs = f"encoder/levels/{level}", "encoder.down_blocks"
        for block in range(config.blocks):
            block_name = f"{theirs}.{level}.resnets.{block}" if config.shortcuts else f"{theirs}.{offset + block}"
            names |= _map_residual(f"{ours}/blocks/{block}", block_name)
        block_name = f"{theirs}.{level}.downsampler" if config.shortcuts else f"{theirs}.{offset + config.blocks}"
        names |= _map_resample(f"{ours}/down", block_name)
        offset += config.blocks + 1
        ours, theirs = f"decoder/levels/{level}", f"decoder.up_blocks.{level}"
        for block in range(config.blocks + 1):
            names |= _map_residual(f"{ours}/blocks/{block}", f"{theirs}.resnets.{block}")
        names |= _map_resample(f"{ours}/up", f"{theirs}.upsampler" if config.shortcuts else f"{theirs}.upsamplers.0")
    return names


def _map_conv(ours: str, theirs: str) -> dict[str, TensorMapping]:
    return map_kernel_and_bias(ours, theirs, _CONV_3D)


def _map_residual(ours: str, theirs: str) -> dict[str, TensorMapping]:
    names = _map_conv(f"{ours}/conv_in", f"{theirs}.conv1") | _map_conv(f"{ours}/conv_out", f"{theirs}.conv2")
    names |= map_kernel_and_bias(f"{ours}/shortcut", f"{theirs}.conv_shortcut", _CONV_1X1X1)
    names[f"{ours}/norm_in/scale"] = TensorMapping(f"{theirs}.norm1.gamma", "d 1 1 1 -> d")
    names[f"{ours}/norm_out/scale"] = TensorMapping(f"{theirs}.norm2.gamma", "d 1 1 1 -> d")
    return names


def _map_middle(ours: str, theirs: str) -> dict[str, TensorMapping]:
    names = _map_residual(f"{ours}/before", f"{theirs}.resnets.0")
    names |= _map_residual(f"{ours}/after", f"{theirs}.resnets.1")
    attention = f"{theirs}.attentions.0"
    names[f"{ours}/attention/norm/scale"] = TensorMapping(f"{attention}.norm.gamma", "d 1 1 -> d")
    names |= map_kernel_and_bias(f"{ours}/attention/qkv", f"{attention}.to_qkv", CONV_1X1)
    return names | map_kernel_and_bias(f"{ours}/attention/out", f"{attention}.proj", CONV_1X1)


def _map_resample(ours: str, theirs: str) -> dict[str, TensorMapping]:
    names = map_kernel_and_bias(f"{ours}/space", f"{theirs}.resample.1", CONV_2D)
    return names | _map_conv(f"{ours}/time", f"{theirs}.time_conv")


def parse_config(folder: Path, settings: Mapping[str, Any]) -> CausalVaeConfig:
    """Return the config for a folder's settings.

    Raises:
      UserError: If a setting is not supported.
    """
    fixed = {"attn_scales": [], "dropout": 0.0}
    patch = settings["patch_size"] or 1
    fixed |= {"in_channels": 3 * patch**2, "out_channels": 3 * patch**2}
    folders.check_supported(folder, settings, fixed)
    levels = len(settings["dim_mult"]) - 1
    return CausalVaeConfig(
        channels=settings["z_dim"],
        width=settings["base_dim"],
        decoder_width=settings["decoder_base_dim"],
        multipliers=tuple(settings["dim_mult"]),
        factors=tuple(Grid(1 + bool(time), 2, 2) for time in settings["temperal_downsample"][:levels]),
        blocks=settings["num_res_blocks"],
        patch=patch,
        shortcuts=settings["is_residual"],
    )


def make_document(config: CausalVaeConfig, params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a config and its normalizer; the inverse of `parse_config`.

    Raises:
      UserError: If diffusers' class can't express the config.
    """
    if any(factors.h != 2 for factors in config.factors):
        raise UserError(f"{CLASS} halves height and width at every level, so factors of (2, 1, 1) can't be written")
    side, normalizer = 3 * config.patch**2, params["normalizer"]
    return {
        "base_dim": config.width,
        "decoder_base_dim": config.decoder_width,
        "z_dim": config.channels,
        "dim_mult": list(config.multipliers),
        "num_res_blocks": config.blocks,
        "attn_scales": [],
        "temperal_downsample": [factors.t == 2 for factors in config.factors],
        "dropout": 0.0,
        "is_residual": config.shortcuts,
        "in_channels": side,
        "out_channels": side,
        "patch_size": config.patch if config.patch > 1 else None,
        "scale_factor_temporal": config.stride.t,
        "scale_factor_spatial": config.stride.h,
        "latents_mean": [folders.compute_shortest_decimal(value) for value in np.asarray(normalizer["mean"])],
        "latents_std": [folders.compute_shortest_decimal(value) for value in np.asarray(normalizer["std"])],
    }


# `clip_output` of the published TI2V-5B is not an argument of diffusers' class, which drops it and always clamps its
# output to [-1, 1] (`_decode` in `autoencoder_kl_wan.py`), as clips are clamped here.
FORMAT = AutoencoderFormat(
    CLASS,
    CausalVaeConfig,
    _DEFAULTS,
    parse_config,
    make_wan_vae_tensor_map,
    parse_normalizer,
    make_document,
    unused=("clip_output",),
)
