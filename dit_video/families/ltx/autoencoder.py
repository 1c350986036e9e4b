"""LTX-Video's autoencoders: diffusers' `AutoencoderKLLTXVideo`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dit_video.core.errors import UserError
from dit_video.families.autoencoder_format import AutoencoderFormat
from dit_video.models.autoencoders import LtxVaeConfig
from dit_video.weights import folders
from dit_video.weights.folders import map_kernel_and_bias, map_linear, map_scale_and_shift
from dit_video.weights.tensor_map import TensorMapping

CLASS = "AutoencoderKLLTXVideo"
_DOWN_BLOCK, RESIDUAL_DOWN_BLOCK = "LTXVideoDownBlock3D", "LTXVideo095DownBlock3D"
_CONV_3D = "o i t h w -> t h w i o"
_DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 128,
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": [_DOWN_BLOCK] * 4,
    "decoder_block_out_channels": [128, 256, 512, 512],
    "layers_per_block": [4, 3, 3, 3, 4],
    "decoder_layers_per_block": [4, 3, 3, 3, 4],
    "spatio_temporal_scaling": [True, True, True, False],
    "decoder_spatio_temporal_scaling": [True, True, True, False],
    "decoder_inject_noise": [False] * 5,
    "downsample_type": ["conv"] * 4,
    "upsample_residual": [False] * 4,
    "upsample_factor": [1] * 4,
    "timestep_conditioning": False,
    "patch_size": 4,
    "patch_size_t": 1,
    "resnet_norm_eps": 1e-6,
    "scaling_factor": 1.0,
    "encoder_causal": True,
    "decoder_causal": False,
    "spatial_compression_ratio": None,
    "temporal_compression_ratio": None,
}
_FIXED = ("in_channels", "out_channels", "patch_size_t", "resnet_norm_eps", "scaling_factor")
_SUPPORTED = {name: _DEFAULTS[name] for name in (*_FIXED, "encoder_causal", "decoder_causal")}


def parse_config(folder: Path, settings: Mapping[str, Any]) -> LtxVaeConfig:
    """Return the config for a folder's settings.

    Raises:
      UserError: If a setting is not supported.
    """
    folders.check_supported(folder, settings, _SUPPORTED)
    kinds = list(settings["down_block_types"])
    is_residual = kinds[-1:] == [RESIDUAL_DOWN_BLOCK]
    expected = [RESIDUAL_DOWN_BLOCK if is_residual else _DOWN_BLOCK] * len(kinds)
    folders.check_supported(folder, {"down_block_types": kinds}, {"down_block_types": expected})
    scaled = list(settings["spatio_temporal_scaling"])
    if is_residual:
        all_levels = {"spatio_temporal_scaling": [True] * len(kinds)}
        folders.check_supported(folder, {"spatio_temporal_scaling": scaled}, all_levels)
        downsampling = tuple(settings["downsample_type"])
    else:
        downsampling = tuple("conv" if each else "none" for each in scaled)
    config = LtxVaeConfig(
        channels=settings["latent_channels"],
        patch=settings["patch_size"],
        widths=tuple(settings["block_out_channels"]),
        blocks=tuple(settings["layers_per_block"]),
        downsampling=downsampling,
        decoder_widths=tuple(settings["decoder_block_out_channels"]),
        decoder_blocks=tuple(settings["decoder_layers_per_block"]),
        upsampling=tuple(settings["decoder_spatio_temporal_scaling"]),
        upsample_factors=tuple(settings["upsample_factor"]),
        upsample_residuals=tuple(settings["upsample_residual"]),
        noise=tuple(settings["decoder_inject_noise"]),
        has_time=settings["timestep_conditioning"],
    )
    for name, value in _make_ratios(config).items():
        if settings[name] not in (None, value):
            rule = f"its levels make {value}. Use {name}={value}"
            raise UserError(f"{folder / 'config.json'}: {name}={settings[name]} is invalid: {rule}.")
    return config


def make_document(config: LtxVaeConfig, params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a config; the inverse of `parse_config`."""
    levels, is_residual = len(config.downsampling), config.has_residual_downsampling
    return {
        **_DEFAULTS,
        "latent_channels": config.channels,
        "patch_size": config.patch,
        "block_out_channels": list(config.widths),
        "down_block_types": [RESIDUAL_DOWN_BLOCK if is_residual else _DOWN_BLOCK] * levels,
        "layers_per_block": list(config.blocks),
        "spatio_temporal_scaling": [kind != "none" for kind in config.downsampling],
        "downsample_type": list(config.downsampling) if is_residual else ["conv"] * levels,
        "decoder_block_out_channels": list(config.decoder_widths),
        "decoder_layers_per_block": list(config.decoder_blocks),
        "decoder_spatio_temporal_scaling": list(config.upsampling),
        "decoder_inject_noise": list(config.noise),
        "upsample_residual": list(config.upsample_residuals),
        "upsample_factor": list(config.upsample_factors),
        "timestep_conditioning": config.has_time,
        # diffusers does not derive these factors from residual downsampling.
        **(_make_ratios(config) if is_residual else {}),
    }


def _make_ratios(config: LtxVaeConfig) -> dict[str, int]:
    return {"spatial_compression_ratio": config.stride.h, "temporal_compression_ratio": config.stride.t}


def make_tensor_map(config: LtxVaeConfig) -> dict[str, TensorMapping]:
    """Return the tensor map of diffusers' class, whose files store the normalizer's values as tensors."""
    names = {f"normalizer/{name}": TensorMapping(f"latents_{name}") for name in ("mean", "std")}
    for side in ("encoder", "decoder"):
        names |= _map_conv(f"{side}/conv_in", f"{side}.conv_in") | _map_conv(f"{side}/conv_out", f"{side}.conv_out")
    for block in range(config.blocks[-1]):
        names |= _map_residual(f"encoder/middle/{block}", f"encoder.mid_block.resnets.{block}")
    for level, blocks in enumerate(config.blocks[:-1]):
        ours, theirs = f"encoder/levels/{level}", f"encoder.down_blocks.{level}"
        for block in range(blocks):
            names |= _map_residual(f"{ours}/blocks/{block}", f"{theirs}.resnets.{block}")
        if config.has_residual_downsampling:
            names |= _map_conv(f"{ours}/residual_down/conv", f"{theirs}.downsamplers.0.conv")
        else:
            names |= _map_conv(f"{ours}/down", f"{theirs}.downsamplers.0")
            names |= _map_residual(f"{ours}/widen", f"{theirs}.conv_out")
    names |= _map_decoder_blocks("decoder/middle", "decoder.mid_block", config.decoder_blocks[-1])
    for level, blocks in enumerate(config.decoder_blocks[-2::-1]):
        ours, theirs = f"decoder/levels/{level}", f"decoder.up_blocks.{level}"
        names |= _map_residual(f"{ours}/narrow", f"{theirs}.conv_in")
        names |= _map_conv(f"{ours}/up/conv", f"{theirs}.upsamplers.0.conv")
        names |= _map_decoder_blocks(f"{ours}/inner", theirs, blocks)
    names["decoder/time_scale"] = TensorMapping("decoder.timestep_scale_multiplier")
    names["decoder/table"] = TensorMapping("decoder.scale_shift_table")
    return names | _map_time("decoder/time", "decoder.time_embedder")


def _map_conv(ours: str, theirs: str) -> dict[str, TensorMapping]:
    return map_kernel_and_bias(ours, f"{theirs}.conv", _CONV_3D)


def _map_residual(ours: str, theirs: str) -> dict[str, TensorMapping]:
    names = _map_conv(f"{ours}/conv_in", f"{theirs}.conv1") | _map_conv(f"{ours}/conv_out", f"{theirs}.conv2")
    names |= _map_conv(f"{ours}/shortcut", f"{theirs}.conv_shortcut")
    names |= map_scale_and_shift(f"{ours}/shortcut_norm", f"{theirs}.norm3")
    names[f"{ours}/table"] = TensorMapping(f"{theirs}.scale_shift_table")
    names[f"{ours}/noise_in"] = TensorMapping(f"{theirs}.per_channel_scale1", "d 1 1 -> d")
    names[f"{ours}/noise_out"] = TensorMapping(f"{theirs}.per_channel_scale2", "d 1 1 -> d")
    return names


def _map_decoder_blocks(ours: str, theirs: str, blocks: int) -> dict[str, TensorMapping]:
    names = _map_time(f"{ours}/time", f"{theirs}.time_embedder")
    for block in range(blocks):
        names |= _map_residual(f"{ours}/blocks/{block}", f"{theirs}.resnets.{block}")
    return names


def _map_time(ours: str, theirs: str) -> dict[str, TensorMapping]:
    layers = {"time_in": "linear_1", "time_out": "linear_2"}
    return map_linear({f"{ours}/{path}": f"{theirs}.timestep_embedder.{name}" for path, name in layers.items()})


FORMAT = AutoencoderFormat(CLASS, LtxVaeConfig, _DEFAULTS, parse_config, make_tensor_map, None, make_document)
