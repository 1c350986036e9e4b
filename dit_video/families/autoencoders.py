"""Autoencoders in diffusers' folder layout, in and out: `config.json` and `diffusion_pytorch_model.safetensors`."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dit_video.autoencoders import AutoencoderConfig, CausalVaeConfig, ImageVaeConfig, VqConfig
from dit_video.core.errors import UserError
from dit_video.families.kandinsky import autoencoder as vq_autoencoder
from dit_video.families.stable_diffusion import autoencoder as image_autoencoder
from dit_video.families.wan import autoencoder as wan_autoencoder
from dit_video.weights import diffusers, native_format
from dit_video.weights.tensor_mapping import SHARD_BYTES

_Loaded = tuple[AutoencoderConfig, dict[str, Any]]
_LOADERS: dict[str, Callable[[Path, dict[str, Any]], _Loaded]] = {
    wan_autoencoder.CLASS: wan_autoencoder.load,
    image_autoencoder.CLASS: image_autoencoder.load,
    vq_autoencoder.CLASS: vq_autoencoder.load,
}
KINDS = tuple(_LOADERS)
"""the classes of diffusers that are known"""
KNOWN = (*KINDS, native_format.CLASS)


def load_autoencoder(folder: str | os.PathLike) -> _Loaded:
    """The config and parameters of an autoencoder from diffusers, or in our own layout.

    Raises:
      MissingError: no such folder, or files that it lacks.
      UserError: a model class that isn't known here, a setting of it that isn't, or weights that do not fit.
    """
    folder = Path(folder)
    document = _document(folder)
    if document["_class_name"] != native_format.CLASS:
        return _LOADERS[document["_class_name"]](folder, document)
    config, params = native_format.read_part(folder, document)
    return _own(folder, config), params


def autoencoder_config(folder: str | os.PathLike) -> AutoencoderConfig:
    """The config of an autoencoder, of Wan's without reading its weights; raises as `load_autoencoder`."""
    folder = Path(folder)
    document = _document(folder)
    if document["_class_name"] == native_format.CLASS:
        return _own(folder, native_format.part_config(folder, document))
    return (
        wan_autoencoder.read_config(folder, document)
        if document["_class_name"] == wan_autoencoder.CLASS
        else load_autoencoder(folder)[0]
    )


def _own(folder: Path, config: Any) -> AutoencoderConfig:
    """The config of a model in our own layout, if it is an autoencoder's."""
    if not isinstance(config, AutoencoderConfig):
        raise UserError(f"{folder} holds a {type(config).__name__}, which is no autoencoder's")
    return config


def _document(folder: Path) -> dict[str, Any]:
    """`config.json` of a model that is known here."""
    document = diffusers.document_of(folder)
    kind = document.get("_class_name")
    if kind not in KNOWN:
        raise UserError(f"{folder} holds a model of class {kind}; known here: {', '.join(KNOWN)}")
    return document


def save_autoencoder(
    folder: str | os.PathLike, config: AutoencoderConfig, params: dict[str, Any], *, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write an autoencoder as diffusers reads it; the inverse of `load_autoencoder`.

    A file that would be larger than `shard_bytes` is split.

    Raises:
      UserError: a config that diffusers has no class for, or that its class can't express.
    """
    match config:
        case CausalVaeConfig():
            wan_autoencoder.save(folder, config, params, shard_bytes=shard_bytes)
        case ImageVaeConfig():
            image_autoencoder.save(folder, config, params, shard_bytes=shard_bytes)
        case VqConfig():
            vq_autoencoder.save(folder, config, params, shard_bytes=shard_bytes)
        case _:
            raise UserError(f"diffusers has no class for {type(config).__name__}; it can write {', '.join(KINDS)}")
