"""Vector-quantised autoencoders of images: diffusers' `VQModel` (VQGAN, Kandinsky's MoVQ)."""

import os
from pathlib import Path
from typing import Any

from dit_video.autoencoders import CodebookConfig, ImageVaeConfig, VqConfig
from dit_video.core.errors import UserError
from dit_video.families.stable_diffusion import autoencoder as image_autoencoder
from dit_video.nn import param_shapes
from dit_video.weights import diffusers
from dit_video.weights.diffusers import DENSE_PICTURE, both
from dit_video.weights.tensor_mapping import SHARD_BYTES, Foreign, Names

CLASS = "VQModel"
_GROUPS = 32
"""Number of groups in diffusers' modulated norms, whatever the settings say."""
_DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
    "block_out_channels": [64],
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 3,
    "sample_size": 32,
    "num_vq_embeddings": 256,
    "norm_num_groups": 32,
    "vq_embed_dim": None,
    "scaling_factor": 0.18215,
    "norm_type": "group",
    "mid_block_add_attention": True,
    "lookup_from_codebook": False,
    "force_upcast": False,
    # Our additions, which diffusers ignores: a normalisation per channel, which `scaling_factor` can't express.
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
}
_SPATIAL_NORM = image_autoencoder.NormNames(
    "spatial_norm",
    {
        "norm/scale": ("norm_layer.weight", ""),
        "norm/shift": ("norm_layer.bias", ""),
        "scale/kernel": ("conv_y.weight", DENSE_PICTURE),
        "scale/bias": ("conv_y.bias", ""),
        "shift/kernel": ("conv_b.weight", DENSE_PICTURE),
        "shift/bias": ("conv_b.bias", ""),
    },
)


def load(folder: Path, document: dict[str, Any]) -> tuple[VqConfig, dict[str, Any]]:
    """Read the config and parameters of a folder, whose config file is `document`.

    `sample_size`, `force_upcast` and `lookup_from_codebook`, which control diffusers' tiling, rounding and calling, are
    ignored.

    Raises:
      MissingError: files are missing.
      UserError: a setting is not supported, or the weights do not fit.
    """
    settings = diffusers.settings(folder, document, _DEFAULTS)
    if settings["norm_type"] not in ("group", "spatial"):
        raise UserError(
            f"{folder / 'config.json'}: norm_type={settings['norm_type']} is not supported, only group, spatial"
        )
    channels, width = settings["latent_channels"], settings["vq_embed_dim"]
    config = VqConfig(
        network=ImageVaeConfig(channels=channels, levels=image_autoencoder.levels_of(folder, settings)),
        codebook=CodebookConfig(codes=settings["num_vq_embeddings"], width=channels if width is None else width),
        modulated=settings["norm_type"] == "spatial",
    )
    _check_modulation(config, str(folder / "config.json"))
    shapes = param_shapes(config.make)
    del shapes["normalizer"]
    params = diffusers.read(folder, image_autoencoder.as_found(folder, names_of(config)), shapes)
    return config, params | {"normalizer": image_autoencoder.normalizer_of(folder, settings, config.channels)}


def save(
    folder: str | os.PathLike, config: VqConfig, params: dict[str, Any], *, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write a config and parameters as a folder; the inverse of `load`.

    Raises:
      UserError: diffusers' class can't express the config.
    """
    network = config.network
    if not isinstance(network, ImageVaeConfig):
        raise UserError(
            f"{CLASS} is an autoencoder of images, so a network of clips ({type(network).__name__}) can't be written"
        )
    if config.codebook.spherical:
        raise UserError(
            f"{CLASS} compares latents and codes without normalising them, so a spherical codebook can't be written"
        )
    _check_modulation(config, CLASS)
    document = {
        "_class_name": CLASS,
        **image_autoencoder.settings_of(network.levels),
        "latent_channels": network.channels,
        "num_vq_embeddings": config.codebook.codes,
        "vq_embed_dim": config.codebook.width,
        "norm_type": "spatial" if config.modulated else "group",
        **{
            name: value
            for name, value in image_autoencoder.scales_of(params["normalizer"]).items()
            if value is not None
        },
    }
    diffusers.write(folder, document, names_of(config), params, shard_bytes=shard_bytes)


def _check_modulation(config: VqConfig, where: str) -> None:
    """Raise UserError for modulated norms that diffusers' settings can't express."""
    assert isinstance(config.network, ImageVaeConfig)
    channels, groups = config.network.channels, config.network.levels.groups
    if config.modulated and channels != config.codebook.width:
        raise UserError(
            f"{where}: norms are modulated by latents of {channels} channels, but codes have {config.codebook.width}. "
            "Use the same number"
        )
    if config.modulated and groups != _GROUPS:
        raise UserError(f"{where}: groups={groups} is invalid: modulated norms of {CLASS} have {_GROUPS} groups")


def names_of(config: VqConfig) -> Names:
    """Return the tensor map of diffusers' `VQModel`."""
    assert isinstance(config.network, ImageVaeConfig)
    levels = config.network.levels
    norm = _SPATIAL_NORM if config.modulated else image_autoencoder.GROUP_NORM
    names = image_autoencoder.encoder_names(levels) | image_autoencoder.decoder_names(levels, norm)
    names |= both("to_codes", "quant_conv", DENSE_PICTURE) | both("from_codes", "post_quant_conv", DENSE_PICTURE)
    return names | {"codebook/codes": Foreign("quantize.embedding.weight")}
