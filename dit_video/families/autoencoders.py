"""Autoencoders in diffusers' folder layout or the native format: `config.json` and weights in safetensors."""

import os
from pathlib import Path
from typing import Any

from dit_video.core.errors import UserError
from dit_video.core.trees import map_with_path
from dit_video.families.kandinsky.autoencoder import FORMAT as VQ_FORMAT
from dit_video.families.ltx.autoencoder import FORMAT as LTX_FORMAT
from dit_video.families.stable_diffusion.autoencoder import FORMAT as IMAGE_FORMAT
from dit_video.families.wan.autoencoder import FORMAT as WAN_FORMAT
from dit_video.models.autoencoders import AutoencoderConfig
from dit_video.weights import folders, io
from dit_video.weights.parameter import Parameter, Placement
from dit_video.weights.tensor_map import SHARD_BYTES

_LoadedAutoencoder = tuple[AutoencoderConfig, dict[str, Any]]
_FORMATS_BY_CLASS = {each.class_name: each for each in (WAN_FORMAT, IMAGE_FORMAT, VQ_FORMAT, LTX_FORMAT)}
EXTERNAL_CLASSES = tuple(_FORMATS_BY_CLASS)
"""Supported model classes of diffusers."""
SUPPORTED_CLASSES = (*EXTERNAL_CLASSES, io.NATIVE_CLASS)


def load_autoencoder(folder: str | os.PathLike) -> _LoadedAutoencoder:
    """Read the config and parameters of an autoencoder from diffusers, or in the native format.

    Raises:
      MissingError: If the folder or one of its files does not exist.
      UserError: If the model class or one of its settings is not supported, or the weights do not fit.
    """
    folder = Path(folder)
    document = _read_document(folder)
    if document["_class_name"] == io.NATIVE_CLASS:
        config = io.read_native_config(folder, document, AutoencoderConfig, "an autoencoder")
        return config, io.read_native(folder, config)
    return _FORMATS_BY_CLASS[document["_class_name"]].load(folder, document)


def check_autoencoder_weights(folder: str | os.PathLike) -> None:
    """Check by the files' headers that the weights in a folder are complete and fit its config.

    It raises as `load_autoencoder` does.
    """
    folder = Path(folder)
    document = _read_document(folder)
    if document["_class_name"] != io.NATIVE_CLASS:
        _FORMATS_BY_CLASS[document["_class_name"]].check_weights(folder, document)
        return
    config = io.read_native_config(folder, document, AutoencoderConfig, "an autoencoder")
    with io.open_native(folder, config):
        pass


def read_autoencoder_config(folder: str | os.PathLike) -> AutoencoderConfig:
    """Read the config of an autoencoder, without the weights; raises as `load_autoencoder` does."""
    folder = Path(folder)
    document = _read_document(folder)
    if document["_class_name"] == io.NATIVE_CLASS:
        return io.read_native_config(folder, document, AutoencoderConfig, "an autoencoder")
    return _FORMATS_BY_CLASS[document["_class_name"]].read_config(folder, document)


def _read_document(folder: Path) -> dict[str, Any]:
    """Read `config.json`; raise UserError if the model class is not supported."""
    document = folders.read_document(folder)
    folders.check_class(folder, document.get("_class_name"), SUPPORTED_CLASSES)
    return document


def save_autoencoder(
    folder: str | os.PathLike, config: AutoencoderConfig, params: dict[str, Any], *, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write an autoencoder as diffusers reads it; the inverse of `load_autoencoder`.

    Files that would be larger than `shard_bytes` are split.

    Raises:
      UserError: If diffusers has no class for the config, or its class can't express it.
    """
    autoencoder_format = next((each for each in _FORMATS_BY_CLASS.values() if type(config) is each.config_class), None)
    if autoencoder_format is None:
        raise UserError(f"diffusers has no class for {type(config).__name__}, only {', '.join(EXTERNAL_CLASSES)}")
    autoencoder_format.save(folder, config, params, shard_bytes=shard_bytes)


def load_placed_autoencoder(folder: Path, place: Placement) -> dict[str, Any]:
    """Read the parameters of an autoencoder; `place` gets `autoencoder/...`. Raises as `load_autoencoder` does."""
    _, params = load_autoencoder(folder)
    return map_with_path(lambda path, x: place(f"autoencoder/{path}", Parameter.from_array(x)), params)
