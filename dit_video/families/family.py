"""The interface of open model families: the files of their denoisers, and their pipelines."""

import abc
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, NamedTuple

import numpy as np

from dit_video.autoencoders import AutoencoderConfig
from dit_video.backbones.protocol import BackboneConfig, ConfigT
from dit_video.conditioning import FrameConditioning
from dit_video.core.errors import UserError
from dit_video.core.files import read_json, write_json
from dit_video.nn import get_param_shapes
from dit_video.pipelines.pipeline import Pipeline
from dit_video.text import FrozenTextConfig
from dit_video.tokens import Grid
from dit_video.weights import LoadedScheduler, diffusers, native_format, streaming
from dit_video.weights.folders import TensorFolder
from dit_video.weights.lora import LoraModule
from dit_video.weights.parameter import Placement, place_on_host
from dit_video.weights.streaming import FileMap, FolderSource, ParamsSource
from dit_video.weights.tensor_map import SHARD_BYTES, make_dtype_fn

FileLayout = Literal["diffusers", "authors"]
"""Layout of a denoiser's files: that of diffusers, or of the model's authors."""
Dtype = Literal["float32", "bfloat16"]
INDEX = "model_index.json"
"""File of a pipeline's folder that names its class and its parts."""


def read_pipeline_class(folder: Path) -> str | None:
    """Return the class that a pipeline's `model_index.json` names; None without that file, "None" without a class."""
    if not (folder / INDEX).is_file():
        return None
    index = read_json(folder / INDEX)
    return str(index.get("_class_name") if isinstance(index, dict) else None)


class DenoiserFormat(abc.ABC, Generic[ConfigT]):
    """The files of a family's denoisers: a `config.json`, and weights in safetensors.

    A subclass converts the config, and maps our parameters to the tensors of the files. Reading and writing, tensor by
    tensor, are the same for all.
    """

    config_class: type[ConfigT]
    """Class of the configs."""
    layouts: ClassVar[Mapping[str, FileLayout]]
    """Layout of the files by the model class that `config.json` names."""
    unadapted: ClassVar[tuple[str, ...]] = ()
    """Paths of kernels of which the family's LoRA files hold no adapter."""

    @abc.abstractmethod
    def read_config(self, folder: Path, document: dict[str, Any]) -> ConfigT:
        """Return the config of a folder, or of the authors' file, with this `config.json`.

        Raises:
          MissingError: files are missing.
          UserError: a setting is not supported.
        """

    @abc.abstractmethod
    def make_document(self, config: ConfigT, layout: FileLayout) -> dict[str, Any]:
        """Return the `config.json` of a config; the inverse of `read_config`.

        Raises:
          UserError: the layout can't express the config.
        """

    def can_express(self, config: ConfigT, layout: FileLayout = "diffusers") -> bool:
        """Return True if the layout can express a config."""
        try:
            self.make_document(config, layout)
        except UserError:
            return False
        return True

    @abc.abstractmethod
    def make_file_map(self, config: ConfigT, layout: FileLayout) -> FileMap:
        """Return which tensors hold each parameter."""

    def get_lora_modules(self, config: ConfigT, *, primary_layout: FileLayout = "diffusers") -> dict[str, LoraModule]:
        """Return the linear maps that LoRA files may adapt, by their names there; those of `primary_layout` come first.

        It is empty for a family without LoRA files of its own.
        """
        return {}

    def open_file(self, path: Path) -> tuple[TensorFolder, dict[str, Any]] | None:
        """Open the authors' checkpoint in a single file; return its tensors and what its `config.json` would say.

        Return None for a file that is not of this family.
        """
        return None

    def read_folder_config(self, folder: Path) -> ConfigT:
        """Read the config of a folder in one of the layouts or in the native format; errors are those of `load`."""
        document = diffusers.read_document(folder)
        if document.get("_class_name") == native_format.CLASS:
            return self._check(folder, native_format.read_native_config(folder, document))
        return self.read_config(folder, self._check_class(folder, document))

    def load(
        self,
        folder: str | os.PathLike,
        *,
        dtype: Any = np.float32,
        kernel_dtype: Any = None,
        place: Placement = place_on_host,
    ) -> tuple[ConfigT, dict[str, Any]]:
        """Read the config and parameters of a folder in one of the layouts or in the native format, or of a file.

        Arguments are those of `load_denoiser`.

        Raises:
          MissingError: the folder or one of its files does not exist.
          UserError: a model of another family, unsupported settings, or weights that do not fit.
        """
        folder, dtype_fn = Path(folder), make_dtype_fn(dtype, kernel_dtype)
        if folder.is_file():
            if (opened := self.open_file(folder)) is None:
                raise UserError(f"{folder} holds no model of {self.config_class.__name__}; name another file")
            with opened[0] as tensors:
                return self.read(tensors, folder, opened[1], dtype_fn, place)
        document = diffusers.read_document(folder)
        if document.get("_class_name") == native_format.CLASS:
            config = self._check(folder, native_format.read_native_config(folder, document))
            return config, native_format.read_native(folder, config, dtype_fn=dtype_fn, place=place)
        with TensorFolder(folder, stem=diffusers.STEM) as tensors:
            return self.read(tensors, folder, self._check_class(folder, document), dtype_fn, place)

    def read(
        self,
        tensors: TensorFolder,
        folder: Path,
        document: dict[str, Any],
        dtype_fn: Callable[[str], Any],
        place: Placement,
    ) -> tuple[ConfigT, dict[str, Any]]:
        """Read the config and parameters from open tensors, with the dtype that `dtype_fn` returns for each path."""
        config = self.read_config(folder, document)
        file_map = self.make_file_map(config, self.layouts[document["_class_name"]])
        shapes = get_param_shapes(config.make)
        source = FolderSource(tensors, file_map, shapes)
        return config, streaming.read(source, shapes, dtype_fn=dtype_fn, place=place)

    def _check(self, folder: Path, config: Any) -> ConfigT:
        """Return a config if it is of this family, else raise UserError."""
        if not isinstance(config, self.config_class):
            name = type(config).__name__
            raise UserError(f"{folder} holds a {name}, not a {' or '.join(self.layouts)}; copy it again")
        return config

    def _check_class(self, folder: Path, document: dict[str, Any]) -> dict[str, Any]:
        """Return a `config.json` if it is of this family, else raise UserError."""
        if (name := document.get("_class_name")) not in self.layouts:
            raise UserError(f"{folder} holds a model of class {name}, not a {' or '.join(self.layouts)}; copy it again")
        return document

    def save(
        self,
        folder: str | os.PathLike,
        config: ConfigT,
        params: dict[str, Any],
        *,
        layout: FileLayout = "diffusers",
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        """Write a config and parameters as a folder, with tensors in their own dtypes; the inverse of `load`.

        Raises:
          UserError: the layout can't express the config.
        """
        document, shapes = self.make_document(config, layout), get_param_shapes(config.make)
        names, source = self.make_file_map(config, layout), ParamsSource(params)
        streaming.write(folder, diffusers.STEM, source, names, shapes, shard_bytes=shard_bytes)
        write_json(Path(folder) / "config.json", document)


class PipelineParts(NamedTuple):
    """The configs in a pipeline's folder, with the family's settings that no file holds."""

    denoiser: BackboneConfig
    autoencoder: AutoencoderConfig
    text: FrozenTextConfig
    schedule: LoadedScheduler
    size: Grid
    """Frames, height and width of the clips that the model was trained on, at most."""
    fps: float
    """Frame rate of these clips."""
    boundary: float | None = None
    """Boundary time of two experts: the one in `transformer` denoises from it on, the one in `transformer_2` below."""
    frame_conditioning: FrameConditioning | None = None
    """Conditioning on a first frame; None for a model without it."""
    image_encoder: str | None = None
    """Folder of the image encoder whose tokens the denoiser reads."""


class Family(abc.ABC):
    """An open model family."""

    name: ClassVar[str]
    denoiser: ClassVar[DenoiserFormat]
    """Files of its denoisers."""
    parts: ClassVar[tuple[str, ...]]
    """Subfolders of a pipeline that are read, and downloaded from the hub."""

    pipeline_classes: ClassVar[tuple[str, ...]]
    """Classes of its pipelines in `model_index.json`."""

    def is_pipeline(self, folder: Path) -> bool:
        """Return True for the folder of a pipeline of this family."""
        return read_pipeline_class(folder) in self.pipeline_classes

    @abc.abstractmethod
    def load_pipeline(
        self, folder: Path, *, text_encoder: str | os.PathLike | None, dtype: Dtype, place: Placement | None
    ) -> Pipeline:
        """Load the pipeline of a folder; arguments are those of `dit_video.load`."""

    def read_parts(self, folder: Path) -> PipelineParts:
        """Read the configs of a pipeline's folder, from which its denoiser is fine-tuned.

        Raises:
          MissingError: the folder lacks parts.
          UserError: unsupported settings, or a family whose models cannot be fine-tuned here.
        """
        raise UserError(f"{folder} holds a model of the family {self.name}, which cannot be fine-tuned; use another")
