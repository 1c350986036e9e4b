"""Model folders as `transformers` and diffusers write them: one safetensors file, or several with an index."""

import contextlib
import json
import math
import os
import warnings
from collections.abc import Collection, Iterator, Mapping
from io import RawIOBase
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dit_video.core.errors import MissingError, UserError
from dit_video.core.files import read_json
from dit_video.weights.safetensors import (
    NUMPY_DTYPES,
    check_not_quantized,
    make_corrupt_error,
    make_dtype_error,
    open_safetensors,
)
from dit_video.weights.tensor_map import TensorMapping

STEM = "diffusion_pytorch_model"
CONV_2D = "o i h w -> 1 h w i o"
"""Layout of a 2D convolution's kernel."""
DENSE = "o i -> i o"
"""Layout of a linear map's kernel."""
CONV_1X1 = "o i 1 1 -> i o"
"""Layout of a linear map's kernel that is stored as a 1x1 convolution."""


def read_document(folder: Path) -> dict[str, Any]:
    """Read a folder's `config.json`.

    Raises:
      MissingError: If the folder or the file does not exist.
      UserError: If the file holds no JSON object.
    """
    document = read_json(folder / "config.json")
    if not isinstance(document, dict):
        raise UserError(f"{folder / 'config.json'} is not a JSON object with settings. Copy or download it again")
    return document


def check_class(folder: Path, kind: Any, supported: Collection[str]) -> None:
    """Check the class of the model in a folder.

    Raises:
      UserError: If the class is not supported.
    """
    if kind not in supported:
        raise UserError(f"{folder} has a model of class {kind}. Supported classes are {', '.join(supported)}")


def get_settings(
    folder: Path, document: Mapping[str, Any], defaults: Mapping[str, Any], *, unused: Collection[str] = ()
) -> dict[str, Any]:
    """Return the arguments of a model's class: its defaults, updated by the document.

    Args:
      folder: Folder of the model, for error messages.
      document: Content of its `config.json`.
      defaults: All arguments of the class, with its defaults.
      unused: Settings in published documents that the class lacks and that change nothing.

    Raises:
      UserError: If the document has an argument that is neither in `defaults` nor unused.
    """
    settings = {name: value for name, value in document.items() if not name.startswith("_") and name not in unused}
    values = {**defaults, **settings}
    if unknown := sorted(values.keys() - defaults.keys()):
        raise UserError(f"{folder / 'config.json'} has settings that are not supported: {', '.join(unknown)}")
    return values


def check_supported(folder: Path, settings: Mapping[str, Any], supported: Mapping[str, Any]) -> None:
    """Check that each setting has its only supported value.

    Raises:
      UserError: If a setting has another value; the message names the first one.
    """
    for name, value in supported.items():
        if settings[name] != value:
            raise UserError(f"{folder / 'config.json'}: {name}={settings[name]} is not supported, only {value}")


def map_kernel_and_bias(ours: str, theirs: str, pattern: str, *, layers: int | None = None) -> dict[str, TensorMapping]:
    """Return the mappings of the kernel and the bias of a convolution or a linear map."""
    kernel = TensorMapping(f"{theirs}.weight", pattern, layers=layers)
    return {f"{ours}/kernel": kernel, f"{ours}/bias": TensorMapping(f"{theirs}.bias", layers=layers)}


def map_linear(names: Mapping[str, str], *, layers: int | None = None) -> dict[str, TensorMapping]:
    """Return the mappings of the kernels and biases of linear maps, from our paths to their names."""
    maps = (map_kernel_and_bias(ours, theirs, DENSE, layers=layers) for ours, theirs in names.items())
    return {path: mapping for each in maps for path, mapping in each.items()}


def map_scale_and_shift(ours: str, theirs: str, *, layers: int | None = None) -> dict[str, TensorMapping]:
    """Return the mappings of a norm's scale and shift."""
    scale = TensorMapping(f"{theirs}.weight", layers=layers)
    return {f"{ours}/scale": scale, f"{ours}/shift": TensorMapping(f"{theirs}.bias", layers=layers)}


def compute_shortest_decimal(value: Any) -> float:
    """Return the shortest decimal that rounds to the same float32."""
    return float(str(np.float32(value)))


_MAX_LISTED = 3


class _TensorLocation(NamedTuple):
    """Location of a tensor: a file, an offset and a dtype."""

    path: Path
    file: RawIOBase
    start: int
    """Offset in the file, in bytes."""
    dtype: str
    """Name of the dtype in the safetensors format."""


class TensorFolder(contextlib.AbstractContextManager["TensorFolder"]):
    """The tensors of a model folder, read one at a time: `with TensorFolder(folder) as tensors: tensors.read(name)`.

    Files are read rather than mapped into memory: mapped pages count as the process's memory, which would grow to the
    size of the model.
    """

    def __init__(self, folder: str | os.PathLike, *, stem: str = "model"):
        """Open `stem`.safetensors, or the files that `stem`.safetensors.index.json lists.

        Raises:
          MissingError: If neither file exists, or a listed file doesn't.
          UserError: If the weights are pickled or quantized, a file is damaged, or the index does not fit its files.
        """
        self.folder = Path(folder)
        self._open = contextlib.ExitStack()
        self._locations: dict[str, _TensorLocation] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Shapes of all tensors, by name."""
        with contextlib.ExitStack() as on_error:
            on_error.enter_context(self._open)
            for path, names in _list_files(self.folder, stem).items():
                self._add_file(path, names)
            self._open = on_error.pop_all()

    def _add_file(self, path: Path, names: set[str] | None) -> None:
        """Open one file and locate its tensors: those that an index lists, or all if `names` is None."""
        with open_safetensors(path):  # Checks that the file is complete.
            file = self._open.enter_context(path.open("rb", buffering=0))
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        check_not_quantized(path, {name: entry["dtype"] for name, entry in header.items()})
        if names is not None and (missing := sorted(names - header.keys())):
            raise UserError(f"{path} lacks {_format_names(missing)}, which its index lists. Copy both again")
        for name in sorted(header.keys() if names is None else names):
            entry = header[name]
            self.shapes[name] = tuple(entry["shape"])
            self._locations[name] = _TensorLocation(path, file, 8 + length + entry["data_offsets"][0], entry["dtype"])

    def read(self, name: str) -> np.ndarray:
        """Read one tensor, in the dtype of the file.

        Raises:
          UserError: If the file is damaged, or has a dtype that NumPy lacks.
        """
        return self._read_rows(name, 0, self.shapes[name])

    def get_dtype(self, name: str) -> np.dtype:
        """Return the dtype of one tensor in the file.

        Raises:
          UserError: If NumPy lacks the dtype.
        """
        location = self._locations[name]
        if location.dtype not in NUMPY_DTYPES:
            raise make_dtype_error(location.path, location.dtype)
        return NUMPY_DTYPES[location.dtype]

    def read_row(self, name: str, index: int) -> np.ndarray:
        """Read one row of a tensor, `read(name)[index]`, without the others."""
        return self._read_rows(name, index, self.shapes[name][1:])

    def read_chunks(self, name: str, chunk_bytes: int) -> Iterator[np.ndarray]:
        """Yield a tensor in chunks along its first axis, each of at most `chunk_bytes` bytes but at least one row."""
        shape = self.shapes[name]
        if not shape:
            yield self.read(name)
            return
        rows = max(1, chunk_bytes // max(1, math.prod(shape[1:]) * self.get_dtype(name).itemsize))
        for start in range(0, shape[0], rows):
            yield self._read_rows(name, start, (min(rows, shape[0] - start), *shape[1:]))

    def _read_rows(self, name: str, row: int, shape: tuple[int, ...]) -> np.ndarray:
        """Read an array of this shape from a tensor, starting at a row."""
        location = self._locations[name]
        array = np.empty(shape, self.get_dtype(name))
        location.file.seek(location.start + row * math.prod(self.shapes[name][1:]) * array.itemsize)
        buffer = array.reshape(-1).view(np.uint8).data
        while buffer.nbytes and (count := location.file.readinto(buffer)):
            buffer = buffer[count:]
        if buffer.nbytes:
            raise make_corrupt_error(location.path, f"it ends inside tensor {name}")
        return array

    def __exit__(self, *_: object) -> None:
        self._open.close()


def find_model_folder(folder: str | os.PathLike, subfolder: str) -> Path:
    """Return the folder itself, or the subfolder of a pipeline's folder, such as its `text_encoder`."""
    folder = Path(folder)
    inner = folder / subfolder
    return inner if not (folder / "config.json").is_file() and inner.is_dir() else folder


def read_transformers_config(path: Path, description: str, model_types: Collection[str]) -> tuple[str, Any]:
    """Return the model type and the config of a `config.json`, with the defaults of `transformers`.

    Args:
      path: Path of the file.
      description: Plural noun for the models, for error messages.
      model_types: Supported model types.

    Raises:
      MissingError: If the file does not exist.
      UserError: If the model type is not supported, or its config has invalid values.
    """
    values = read_json(path)
    kind = values.get("model_type") if isinstance(values, dict) else None
    if not isinstance(kind, str) or kind not in model_types:
        raise UserError(f"{path} has model_type={kind!r}. Supported {description} are {', '.join(model_types)}")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoConfig

    try:
        return kind, AutoConfig.for_model(**values)
    except Exception as error:  # Its validation raises exceptions from several libraries.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} is not a valid config of a {kind} model ({reason}). Copy it again") from error


def _list_files(folder: Path, stem: str) -> Mapping[Path, set[str] | None]:
    """Return a folder's files with the tensors that an index lists in each, or with None for all of a single file.

    Saving a model in another number of files leaves those of before. Of both, diffusers reads those of the index, and
    transformers the single one.
    """
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.is_file() and index.is_file():
        library, first, second = ("diffusers", index, single) if stem == STEM else ("transformers", single, index)
        warnings.warn(
            f"{folder} has both {single.name} and {index.name}; {first.name} is read, as {library} does. Remove "
            f"{second.name}, if it is of an older model",
            stacklevel=2,
        )
    if single.is_file() and not (stem == STEM and index.is_file()):
        return {single: None}
    if not index.is_file():
        raise _make_missing_error(folder, stem)
    content = read_json(index)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
        raise UserError(f"{index} has no weight_map from tensors to files. Copy or download it again")
    files: dict[Path, set[str] | None] = {folder / file: set() for file in sorted(set(names.values()))}
    if missing := sorted(path.name for path in files if not path.is_file()):
        raise MissingError(
            f"{folder} lacks {len(missing)} of {len(files)} files that {index.name} lists "
            f"({_format_names(missing)}). Copy or download them too"
        )
    return {path: {name for name, file in names.items() if folder / file == path} for path in files}


def _make_missing_error(folder: Path, stem: str) -> UserError:
    if not folder.is_dir():
        return MissingError(f"no such folder: {folder}. Use the folder of a model")
    if pickles := sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt")):
        return UserError(
            f"{folder} has its weights in pickles ({_format_names(pickles)}), which can run any code when read. "
            f"To convert it where torch is installed, run in that folder: {_make_conversion_command(folder)}"
        )
    missing = f"{folder} has neither {stem}.safetensors nor {stem}.safetensors.index.json"
    if variants := sorted({path.name for path in folder.glob(f"{stem}.*safetensors*") if "-of-" not in path.name}):
        rule = f"it has a variant of other dtypes ({_format_names(variants)})"
        return MissingError(f"{missing}: {rule}. Give it that name, or copy the files of the full model there")
    return MissingError(f"{missing}. Copy them there")


def _make_conversion_command(folder: Path) -> str:
    """Return a shell command that writes a folder's weights as safetensors."""
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else None
    config = config if isinstance(config, dict) else {}
    names = next(iter(config.get("architectures") or ()), None), config.get("_class_name")
    for library, name in zip(("transformers", "diffusers"), names, strict=True):
        # The name comes from an untrusted file and the command is pasted into a shell: allow identifiers only.
        if isinstance(name, str) and name.isidentifier():
            return f"python -c \"import {library} as l; l.{name}.from_pretrained('.').save_pretrained('safetensors')\""
    return "load them with the library that wrote them, and save them with safe_serialization=True"


def _format_names(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return ", ".join(names[:_MAX_LISTED]) + more
