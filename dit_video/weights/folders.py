"""Model folders as `transformers` and diffusers write them: one safetensors file, or several with an index."""

import contextlib
import json
import math
import os
from collections.abc import Collection, Iterator, Mapping
from io import RawIOBase
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import safetensors

from dit_video.core.errors import MissingError, UserError
from dit_video.core.files import read_json
from dit_video.weights.safetensors import NUMPY, corrupt, refuse, unread_dtype

_SHOWN = 3


class _Place(NamedTuple):
    """Where a tensor lies."""

    path: Path
    file: RawIOBase
    start: int
    """byte in the file"""
    dtype: str
    """the format's name of it"""


class TensorFolder:
    """The tensors of a model folder, read one at a time: `with TensorFolder(folder) as tensors: tensors.read(name)`.

    A tensor is in memory once it is read, and nothing else of its file: pages of a mapped file, though the system may
    take them back, count as the process's memory until all of a model was in it.
    """

    def __init__(self, folder: str | os.PathLike, *, stem: str = "model"):
        """Open `stem`.safetensors, or the files that `stem`.safetensors.index.json lists.

        Raises:
          MissingError: neither is there, or a listed file isn't.
          UserError: weights as pickles only, a damaged file, or an index that does not fit its files.
        """
        self.folder = Path(folder)
        self._open = contextlib.ExitStack()
        self._places: dict[str, _Place] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        """of every tensor, by name"""
        with contextlib.ExitStack() as on_error:
            on_error.enter_context(self._open)
            for path, names in _listed(self.folder, stem).items():
                self._add(path, names)
            self._open = on_error.pop_all()

    def _add(self, path: Path, names: set[str] | None) -> None:
        """Open one file; `names` are the tensors that the index says are in it, None where there is no index."""
        refuse(path)
        try:
            with safetensors.safe_open(os.fspath(path), framework="np"):  # which checks that the file is whole
                file = self._open.enter_context(path.open("rb", buffering=0))
        except safetensors.SafetensorError as error:
            raise corrupt(path, error) from error
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        if names is not None and (lacking := sorted(names - header.keys())):
            raise UserError(f"{path} lacks {_some(lacking)}, which its index lists; copy or download both again")
        for name in sorted(header.keys() if names is None else names):
            entry = header[name]
            self.shapes[name] = tuple(entry["shape"])
            self._places[name] = _Place(path, file, 8 + length + entry["data_offsets"][0], entry["dtype"])

    def read(self, name: str) -> np.ndarray:
        """One tensor, in the dtype of the file.

        Raises:
          UserError: a damaged file, or a dtype that NumPy lacks.
        """
        return self._read(name, 0, self.shapes[name])

    def dtype(self, name: str) -> np.dtype:
        """Of one tensor, in the file.

        Raises:
          UserError: one that NumPy lacks.
        """
        place = self._places[name]
        if place.dtype not in NUMPY:
            raise unread_dtype(place.path, place.dtype)
        return NUMPY[place.dtype]

    def row(self, name: str, index: int) -> np.ndarray:
        """`read(name)[index]`, without the others."""
        return self._read(name, index, self.shapes[name][1:])

    def stretches(self, name: str, size: int) -> Iterator[np.ndarray]:
        """`read(name)` in stretches of its first axis, each of so many bytes or, where it is more, one row."""
        shape = self.shapes[name]
        if not shape:
            yield self.read(name)
            return
        rows = max(1, size // max(1, math.prod(shape[1:]) * self.dtype(name).itemsize))
        for start in range(0, shape[0], rows):
            yield self._read(name, start, (min(rows, shape[0] - start), *shape[1:]))

    def _read(self, name: str, row: int, shape: tuple[int, ...]) -> np.ndarray:
        """So much of a tensor, from a row of it on."""
        place = self._places[name]
        array = np.empty(shape, self.dtype(name))
        place.file.seek(place.start + row * math.prod(self.shapes[name][1:]) * array.itemsize)
        into = array.reshape(-1).view(np.uint8).data
        while into.nbytes and (count := place.file.readinto(into)):
            into = into[count:]
        if into.nbytes:
            raise corrupt(place.path, f"it ends within {name}")
        return array

    def __enter__(self) -> "TensorFolder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()


def model_folder(folder: str | os.PathLike, part: str) -> Path:
    """The folder itself, or a pipeline's `part`, such as its `text_encoder`."""
    folder = Path(folder)
    inner = folder / part
    return inner if not (folder / "config.json").is_file() and inner.is_dir() else folder


def transformers_config(path: Path, what: str, kinds: Collection[str]) -> tuple[str, Any]:
    """The model type and the config of a `config.json`; what it leaves out is what `transformers` takes.

    Args:
      path: of the file.
      what: what is looked for, in the plural, for the message.
      kinds: the model types that are known.

    Raises:
      MissingError: no such file.
      UserError: another model type, or values that are none of its config's.
    """
    values = read_json(path)
    kind = values.get("model_type") if isinstance(values, dict) else None
    if not isinstance(kind, str) or kind not in kinds:
        raise UserError(f"{path} has model_type {kind!r}; the {what} known are {', '.join(kinds)}")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoConfig

    try:
        return kind, AutoConfig.for_model(**values)
    except Exception as error:  # its validation raises errors of several libraries
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} is no config of a {kind} model ({reason}); copy or download it again") from error


def _listed(folder: Path, stem: str) -> Mapping[Path, set[str] | None]:
    """The files of a folder, each with the names that an index gives it. A single file goes first, as elsewhere."""
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.is_file():
        return {single: None}
    if not index.is_file():
        raise _no_weights(folder, stem)
    content = read_json(index)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
        raise UserError(f"{index} has no weight_map from tensors to files; copy or download it again")
    files: dict[Path, set[str] | None] = {folder / file: set() for file in sorted(set(names.values()))}
    if absent := sorted(path.name for path in files if not path.is_file()):
        raise MissingError(
            f"{folder} lacks {len(absent)} of {len(files)} files that {index.name} lists ({_some(absent)}); copy or "
            "download them too"
        )
    return {path: {name for name, file in names.items() if folder / file == path} for path in files}


def _no_weights(folder: Path, stem: str) -> UserError:
    if not folder.is_dir():
        return MissingError(f"no such folder: {folder}; give the folder of a model")
    if pickles := sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt")):
        return UserError(
            f"{folder} has its weights in pickles ({_some(pickles)}), which can run any code when they are read; "
            f"convert it where torch is installed, in that folder: {_conversion(folder)}"
        )
    return MissingError(f"{folder} has neither {stem}.safetensors nor {stem}.safetensors.index.json; copy them there")


def _conversion(folder: Path) -> str:
    """A command that writes a folder's weights as safetensors."""
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else None
    config = config if isinstance(config, dict) else {}
    classes = {
        "transformers": next(iter(config.get("architectures") or ()), None),
        "diffusers": config.get("_class_name"),
    }
    for library, name in classes.items():
        # A name from a stranger's file, in a line to be pasted into a shell: letters only.
        if isinstance(name, str) and name.isidentifier():
            return f"python -c \"import {library} as l; l.{name}.from_pretrained('.').save_pretrained('safetensors')\""
    return "load them with the library that wrote them, and save them with safe_serialization=True"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
