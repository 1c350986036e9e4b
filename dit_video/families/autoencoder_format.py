"""File format of one of diffusers' autoencoder classes: how its folders are read and written."""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dit_video.core.files import write_json
from dit_video.nn import get_param_shapes
from dit_video.weights import folders, streaming
from dit_video.weights.folders import STEM, TensorFolder
from dit_video.weights.io import write_params
from dit_video.weights.streaming import FileMap, FolderSource
from dit_video.weights.tensor_map import SHARD_BYTES, TensorMap

_LEGACY_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
"""Names that diffusers gave attention's linear maps before 2023, and still reads."""


class AutoencoderFormat(NamedTuple):
    """The files of one of diffusers' autoencoder classes."""

    class_name: str
    config_class: type
    defaults: Mapping[str, Any]
    """All settings of `config.json` that the class has, with diffusers' defaults."""
    parse_config: Callable[[Path, Mapping[str, Any]], Any]
    """Function from a folder and its settings to our config; raises UserError if a setting is not supported."""
    make_tensor_map: Callable[[Any], TensorMap]
    """Function from our config to the tensor map of all parameters, except the normalizer's if the settings hold
    them."""
    parse_normalizer: Callable[[Path, Mapping[str, Any], int], dict[str, Any]] | None
    """Function from a folder, its settings and the number of channels to the normalizer's parameters; None if the
    tensor map contains them."""
    make_document: Callable[[Any, Mapping[str, Any]], dict[str, Any]]
    """Function from our config and parameters (it reads only the normalizer's) to `config.json`, without the class.

    It raises UserError if the class can't express the config.
    """
    unused: tuple[str, ...] = ()
    """Settings in published folders that the class lacks and that change nothing."""

    def read_config(self, folder: Path, document: Mapping[str, Any]) -> Any:
        """Return the config of a folder whose config file holds `document`.

        Raises:
          UserError: If a setting is not supported.
        """
        return self.parse_config(folder, self._get_settings(folder, document))

    def load(self, folder: Path, document: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Read the config and parameters of a folder whose config file holds `document`.

        Raises:
          MissingError: If files are missing.
          UserError: If a setting is not supported, or the weights do not fit.
        """
        settings, config = self._get_settings(folder, document), self.read_config(folder, document)
        with self._open(folder, config) as source:
            params = streaming.read(source, source.like, dtype_fn=lambda path: np.float32)
        if self.parse_normalizer is not None:
            params |= {"normalizer": self.parse_normalizer(folder, settings, config.channels)}
        return config, params

    def check_weights(self, folder: Path, document: Mapping[str, Any]) -> None:
        """Check by the files' headers that the weights are complete and fit the config; raises as `load` does."""
        with self._open(folder, self.read_config(folder, document)):
            pass

    def _get_settings(self, folder: Path, document: Mapping[str, Any]) -> dict[str, Any]:
        return folders.get_settings(folder, document, self.defaults, unused=self.unused)

    @contextlib.contextmanager
    def _open(self, folder: Path, config: Any) -> Iterator[FolderSource]:
        """Open the weights in a folder; yield the source of all parameters but the normalizer's."""
        shapes = get_param_shapes(config.make)
        if self.parse_normalizer is not None:
            del shapes["normalizer"]
        with TensorFolder(folder, stem=STEM) as tensors:
            tensor_map = _apply_legacy_names(tensors, self.make_tensor_map(config))
            yield FolderSource(tensors, FileMap.from_tensor_map(tensor_map), shapes)

    def save(
        self, folder: str | os.PathLike, config: Any, params: dict[str, Any], *, shard_bytes: int = SHARD_BYTES
    ) -> None:
        """Write a config and parameters as a folder; the inverse of `load`.

        Raises:
          UserError: If the class can't express the config.
        """
        document = {"_class_name": self.class_name, **self.make_document(config, params)}
        has_tensors = self.parse_normalizer is None
        weights = {name: part for name, part in params.items() if name != "normalizer" or has_tensors}
        write_params(folder, STEM, self.make_tensor_map(config), weights, shard_bytes=shard_bytes)
        write_json(Path(folder) / "config.json", document)


def _apply_legacy_names(tensors: TensorFolder, tensor_map: TensorMap) -> TensorMap:
    """Return the map with attention's old names if the folder's tensors have them."""
    if not any(name.endswith(".proj_attn.weight") for name in tensors.shapes):
        return tensor_map

    def older(name: str) -> str:
        for new, old in _LEGACY_NAMES.items():
            name = name.replace(f".{new}.", f".{old}.")
        return name

    return {path: foreign._replace(name=older(foreign.name)) for path, foreign in tensor_map.items()}
