"""Vector-quantised autoencoders of images: diffusers' `VQModel` (VQGAN, Kandinsky's MoVQ)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dit_video.core.errors import UserError
from dit_video.families.autoencoder_format import AutoencoderFormat
from dit_video.families.stable_diffusion import autoencoder as image_autoencoder
from dit_video.models.autoencoders import CodebookConfig, ImageVaeConfig, VqConfig
from dit_video.weights.folders import CONV_1X1, map_kernel_and_bias
from dit_video.weights.tensor_map import TensorMap, TensorMapping

CLASS = "VQModel"
_SPATIAL_NORM_GROUPS = 32
"""Number of groups in diffusers' modulated norms, whatever the settings say."""
_DEFAULTS = image_autoencoder.DEFAULTS | {
    "latent_channels": 3,
    "num_vq_embeddings": 256,
    "vq_embed_dim": None,
    "norm_type": "group",
    "lookup_from_codebook": False,
    "force_upcast": False,
}
"""diffusers' settings, and a per-channel normalisation that `scaling_factor` can't express and diffusers ignores."""
_SPATIAL_NORM = image_autoencoder.NormMapping(
    "spatial_norm",
    {
        "norm/scale": ("norm_layer.weight", ""),
        "norm/shift": ("norm_layer.bias", ""),
        "scale/kernel": ("conv_y.weight", CONV_1X1),
        "scale/bias": ("conv_y.bias", ""),
        "shift/kernel": ("conv_b.weight", CONV_1X1),
        "shift/bias": ("conv_b.bias", ""),
    },
)


def parse_config(folder: Path, settings: Mapping[str, Any]) -> VqConfig:
    """Return the config for a folder's settings.

    `sample_size`, `force_upcast` and `lookup_from_codebook`, which control diffusers' tiling, rounding and calling, are
    ignored.

    Raises:
      UserError: If a setting is not supported.
    """
    norm_type, channels, width = settings["norm_type"], settings["latent_channels"], settings["vq_embed_dim"]
    if norm_type not in ("group", "spatial"):
        raise UserError(f"{folder / 'config.json'}: norm_type={norm_type} is not supported, only group, spatial")
    config = VqConfig(
        network=ImageVaeConfig(channels=channels, levels=image_autoencoder.parse_levels(folder, settings)),
        codebook=CodebookConfig(codes=settings["num_vq_embeddings"], width=channels if width is None else width),
        modulated=norm_type == "spatial",
        quantized_decoding=norm_type != "spatial",  # of Kandinsky's pipelines; those of latent diffusion quantise
    )
    _check_modulation(config, str(folder / "config.json"))
    return config


def make_document(config: VqConfig, params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a config and its normalizer; the inverse of `parse_config`.

    Raises:
      UserError: If diffusers' class can't express the config.
    """
    network = config.network
    if not isinstance(network, ImageVaeConfig):
        raise UserError(f"{CLASS} encodes images, so a network of clips ({type(network).__name__}) can't be written")
    if config.codebook.spherical:
        raise UserError(f"{CLASS} does not normalise latents and codes, so a spherical codebook can't be written")
    if config.modulated == config.quantized_decoding:
        rule = "pipelines quantise latents before decoding if and only if the norms are not modulated (Kandinsky)"
        raise UserError(f"{CLASS}: quantized_decoding={config.quantized_decoding} can't be written: {rule}")
    _check_modulation(config, CLASS)
    normalizer = image_autoencoder.make_normalizer_settings(params["normalizer"])
    return {
        **image_autoencoder.make_level_settings(network.levels),
        "latent_channels": network.channels,
        "num_vq_embeddings": config.codebook.codes,
        "vq_embed_dim": config.codebook.width,
        "norm_type": "spatial" if config.modulated else "group",
        **{name: value for name, value in normalizer.items() if value is not None},
    }


def _check_modulation(config: VqConfig, location: str) -> None:
    """Raise UserError for modulated norms that diffusers' settings can't express."""
    assert isinstance(config.network, ImageVaeConfig)
    channels, groups, width = config.network.channels, config.network.levels.groups, config.codebook.width
    if config.modulated and channels != width:
        raise UserError(f"{location}: latents of {channels} channels can't modulate codes of {width}. Use one number")
    if config.modulated and groups != _SPATIAL_NORM_GROUPS:
        raise UserError(f"{location}: groups={groups} is invalid: modulated norms have {_SPATIAL_NORM_GROUPS} groups")


def make_vq_tensor_map(config: VqConfig) -> TensorMap:
    """Return the tensor map of diffusers' `VQModel`."""
    assert isinstance(config.network, ImageVaeConfig)
    levels = config.network.levels
    norm = _SPATIAL_NORM if config.modulated else image_autoencoder.GROUP_NORM
    names = image_autoencoder.map_side("encoder", levels, image_autoencoder.GROUP_NORM)
    names |= image_autoencoder.map_side("decoder", levels, norm)
    names |= map_kernel_and_bias("to_codes", "quant_conv", CONV_1X1)
    names |= map_kernel_and_bias("from_codes", "post_quant_conv", CONV_1X1)
    return names | {"codebook/codes": TensorMapping("quantize.embedding.weight")}


FORMAT = AutoencoderFormat(
    CLASS, VqConfig, _DEFAULTS, parse_config, make_vq_tensor_map, image_autoencoder.parse_normalizer, make_document
)
