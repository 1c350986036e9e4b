"""Files of denoisers: a `config.json` and weights in safetensors, or a single file of a model's authors."""

import abc
import contextlib
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal

import numpy as np

from dit_video.core.errors import UserError
from dit_video.core.files import write_json
from dit_video.models.backbones.protocol import BackboneConfig, ConfigT
from dit_video.nn import NO_DEVICE, get_param_shapes
from dit_video.sampling.expansion import INSTRUCTIONS
from dit_video.weights import folders, io, streaming
from dit_video.weights.folders import TensorFolder
from dit_video.weights.lora import LoraModule
from dit_video.weights.parameter import Placement, place_on_host
from dit_video.weights.streaming import FileMap, FolderSource, ParamsSource
from dit_video.weights.tensor_map import SHARD_BYTES, make_dtype_fn

FileLayout = Literal["diffusers", "authors"]
"""Layout of a denoiser's files: diffusers' or the model authors'."""


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
    """Paths of kernels for which the family's LoRA files hold no adapter."""
    unused: ClassVar[tuple[str, ...]] = ()
    """Endings of the names of tensors that published files hold and the models do not read."""
    unsupported: ClassVar[Mapping[str, str]] = {}
    """Descriptions of models of the same classes that cannot be read, by the ending of the name of a tensor that only
    they have."""
    float32_kernels: ClassVar[tuple[str, ...]] = ()
    """Paths of kernels whose products are float32 whatever the config's dtype: they stay unrounded when the others are
    read in another dtype."""

    prompt_instructions: ClassVar[str] = INSTRUCTIONS
    """Instructions for a language model that expands prompts as the family's models read them."""

    @abc.abstractmethod
    def read_config(self, folder: Path, document: dict[str, Any]) -> ConfigT:
        """Return the config of a folder or an authors' file that has this `config.json`.

        Raises:
          MissingError: If files are missing.
          UserError: If a setting is not supported.
        """

    @abc.abstractmethod
    def make_document(self, config: ConfigT, layout: FileLayout) -> dict[str, Any]:
        """Return the `config.json` of a config; the inverse of `read_config`.

        Raises:
          UserError: If the layout can't express the config.
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
        """Return the tensors that hold each parameter."""

    def get_lora_modules(self, config: ConfigT, *, primary_layout: FileLayout = "diffusers") -> dict[str, LoraModule]:
        """Return the modules that LoRA files may change, by their names in the files, `primary_layout`'s names first.

        The result is empty for a family without its own LoRA files.
        """
        return {}

    def open_file(self, path: Path) -> tuple[TensorFolder, dict[str, Any]] | None:
        """Open the authors' checkpoint in a single file; return its tensors and what its `config.json` would say.

        Return None for a file that does not belong to this family.
        """
        return None

    def load(
        self,
        folder: str | os.PathLike,
        *,
        dtype: Any = np.float32,
        kernel_dtype: Any = None,
        place: Placement = place_on_host,
    ) -> tuple[ConfigT, dict[str, Any]]:
        """Read a denoiser of this family; arguments, results and errors are those of `load_files`."""
        options: dict[str, Any] = {"dtype": dtype, "kernel_dtype": kernel_dtype, "place": place}
        return load_files([self], folder, config_class=self.config_class, **options)

    def read_folder_config(self, folder: Path) -> ConfigT:
        """Read the config of a denoiser of this family, without its weights; errors are those of `load_files`."""
        return read_files_config([self], folder, config_class=self.config_class)

    def check_weights(self, folder: Path) -> None:
        """Check that the weights in a folder are complete and fit its config; raises as `load_files` does.

        Only the headers of the files are read, unless a family has tensors that repeat others.
        """
        with open_files([self], folder, config_class=self.config_class):
            pass

    def save(
        self,
        folder: str | os.PathLike,
        config: ConfigT,
        params: dict[str, Any],
        *,
        layout: FileLayout = "diffusers",
        shard_bytes: int = SHARD_BYTES,
        is_writer: bool = True,
    ) -> None:
        """Write a config and parameters as a folder, with tensors in their own dtypes; the inverse of `load`.

        `is_writer` is False in a process that only helps the writing process to gather the parameters.

        Raises:
          UserError: If the layout can't express the config.
        """
        document, shapes = self.make_document(config, layout), _get_shapes(config)
        names, source = self.make_file_map(config, layout), ParamsSource(params)
        streaming.write(folder, folders.STEM, source, names, shapes, shard_bytes=shard_bytes, is_writer=is_writer)
        if is_writer:
            write_json(Path(folder) / "config.json", document)


@contextlib.contextmanager
def open_files(
    formats: Sequence[DenoiserFormat], folder: Path, *, config_class: Any = BackboneConfig
) -> Iterator[tuple[Any, FolderSource]]:
    """Open a denoiser's folder or file; yield its config and the source of its parameters.

    Arguments and errors are those of `load_files`.
    """
    if folder.is_file():
        files = ((each, each.open_file(folder)) for each in formats)
        opened = next(((each, *parts) for each, parts in files if parts is not None), None)
        if opened is None:
            raise UserError(f"{folder} is a file of no known model; name a model's folder, with a config.json")
        denoiser_format, tensors, document = opened
    else:
        document = _read_document(formats, folder)
        if document["_class_name"] == io.NATIVE_CLASS:
            config = io.read_native_config(folder, document, config_class, "a supported denoiser")
            with io.open_native(folder, config, _get_shapes(config)) as source:
                yield config, source
            return
        denoiser_format, tensors = _get_format(formats, document), TensorFolder(folder, stem=folders.STEM)
    with tensors:
        config = denoiser_format.read_config(folder, document)
        file_map = denoiser_format.make_file_map(config, denoiser_format.layouts[document["_class_name"]])
        for ending, description in denoiser_format.unsupported.items():
            if name := next((name for name in tensors.shapes if name.endswith(ending)), None):
                raise UserError(f"{folder} is {description} ({name}), which is not supported. Use another model")
        unused = [name for name in tensors.shapes if name.endswith(denoiser_format.unused)]
        yield config, FolderSource(tensors, file_map, _get_shapes(config), ignored=unused)


def _get_shapes(config: Any) -> dict[str, Any]:
    """Return the parameters' shapes without opening a device, because runs read them before their processes connect."""
    is_backbone = isinstance(config, BackboneConfig)
    return get_param_shapes(functools.partial(config.make, partitioner=NO_DEVICE) if is_backbone else config.make)


def load_files(
    formats: Sequence[DenoiserFormat],
    folder: str | os.PathLike,
    *,
    config_class: Any = BackboneConfig,
    dtype: Any = np.float32,
    kernel_dtype: Any = None,
    place: Placement = place_on_host,
) -> tuple[Any, dict[str, Any]]:
    """Read the config and parameters of a denoiser in the layout of one of the formats, or in the native format.

    Args:
      formats: Formats of the families that the denoiser may belong to.
      folder: Folder such as a pipeline's `transformer`, or a file of a model's authors such as
        `DiT-XL-2-256x256.safetensors`.
      config_class: Class of the config of a folder in the native format.
      dtype: Dtype that floating tensors are cast to; None keeps the file's.
      kernel_dtype: Dtype that the kernels of linear maps are cast to, except for the format's `float32_kernels`; None
        casts them to `dtype`, too.
      place: Reads each parameter to its destination, given its path; by default to the host.

    Raises:
      MissingError: If the folder or one of its files does not exist.
      UserError: If the model class or one of its settings is not supported, or the weights do not fit.
    """
    with open_files(formats, Path(folder), config_class=config_class) as (config, source):
        float32_kernels = [
            path for each in formats if isinstance(config, each.config_class) for path in each.float32_kernels
        ]
        dtype_fn = make_dtype_fn(dtype, kernel_dtype, float32_kernels=float32_kernels)
        return config, streaming.read(source, source.like, dtype_fn=dtype_fn, place=place)


def read_files_config(formats: Sequence[DenoiserFormat], folder: Path, *, config_class: Any = BackboneConfig) -> Any:
    """Read the config of a denoiser in a folder or file, without its weights; otherwise as `load_files`."""
    if folder.is_file():
        with open_files(formats, folder, config_class=config_class) as (config, _):
            return config
    document = _read_document(formats, folder)
    if document["_class_name"] == io.NATIVE_CLASS:
        return io.read_native_config(folder, document, config_class, "a supported denoiser")
    return _get_format(formats, document).read_config(folder, document)


def _read_document(formats: Sequence[DenoiserFormat], folder: Path) -> dict[str, Any]:
    """Read `config.json`; raise UserError if none of the formats has its model class."""
    document, classes = folders.read_document(folder), [name for each in formats for name in each.layouts]
    folders.check_class(folder, document.get("_class_name"), (*classes, io.NATIVE_CLASS))
    return document


def _get_format(formats: Sequence[DenoiserFormat], document: Mapping[str, Any]) -> DenoiserFormat:
    return next(each for each in formats if document["_class_name"] in each.layouts)
