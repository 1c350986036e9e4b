"""Safetensors files of nested dictionaries of arrays, with names such as `blocks/attention/query/kernel`.

Files are read by the `safetensors` library but written here: the library writes the metadata in random order, whereas
these files are a function of their content.
"""

import collections
import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from dit_video.core import trees
from dit_video.core.errors import MissingError, UserError
from dit_video.core.files import atomic_path
from dit_video.weights.kernels import add_kernels, describe_kernels

_NUMBERS = {f"{kind}{bits}": f"{kind[0].upper()}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)}
_DTYPES = _NUMBERS | {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "bool": "BOOL"}
"""Names of dtypes in safetensors files by NumPy's name (https://huggingface.co/docs/safetensors, "Format")."""

NUMPY_DTYPES = {theirs: np.dtype(ours) for ours, theirs in _DTYPES.items()}
"""NumPy's dtypes by their name in safetensors files."""

_PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")
_MAX_LISTED = 10
_MAX_HEADER_BYTES = 100_000_000
"""Largest header that the safetensors library accepts."""
_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class StreamedArray:
    """An array that is read while it is written, in chunks of its first axis."""

    shape: tuple[int, ...]
    dtype: np.dtype
    """Dtype that the chunks are cast to."""
    read_chunks: Callable[[], Iterator[np.ndarray]]
    """Function that returns the chunks, each of which is read when it is reached."""

    @property
    def nbytes(self) -> int:
        """Return the size of the array in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def save(
    path: str | os.PathLike,
    tree: Mapping[str, Any],
    *,
    metadata: Mapping[str, str] | None = None,
    dtype: Any = None,
    is_writer: bool = True,
) -> None:
    """Write the arrays of a nested dictionary to a file, atomically.

    Args:
      path: The file, by convention `*.safetensors`; an existing one is replaced.
      tree: Nested dictionary of JAX or NumPy arrays, of `StreamedArray`s, or of registered kernels (`nn.Kernel`) of
        these. Its keys must not contain `/`, which joins them in the file.
      metadata: Text by name, kept in the header.
      dtype: Dtype that floating arrays are cast to, such as `jnp.bfloat16`; None keeps theirs. Integers and booleans
        are never cast.
      is_writer: False in a process that only reads the arrays' chunks, in the order in which another process writes
        them.

    Raises:
      UserError: If the class of a kernel is not registered.
      ValueError: If two arrays get the same name, or the format lacks a dtype.
    """
    metadata = {**(metadata or {}), **describe_kernels(tree)}
    arrays = trees.flatten(tree)
    if len(arrays) != len(jax.tree.leaves(tree)):
        raise ValueError("two arrays have the same name: keys must not contain '/'")
    dtypes = {name: cast_dtype(array.dtype, dtype) for name, array in arrays.items()}
    for name, array_dtype in dtypes.items():
        if array_dtype.name not in _DTYPES:
            raise ValueError(f"{name} has dtype {array_dtype.name}, which safetensors files don't support")
    # Wide dtypes go first, so that every array starts at a multiple of its item size.
    order = sorted(arrays, key=lambda name: (-dtypes[name].itemsize, name))
    header: dict[str, Any] = {}
    if metadata:
        header["__metadata__"] = {name: str(metadata[name]) for name in sorted(metadata)}
    end = 0
    for name in order:
        shape, array_dtype = arrays[name].shape, dtypes[name]
        start, end = end, end + int(np.prod(shape, dtype=np.int64)) * array_dtype.itemsize
        header[name] = {"dtype": _DTYPES[array_dtype.name], "shape": list(shape), "data_offsets": [start, end]}
    chunks = ((name, chunk) for name in order for chunk in _read_chunks(arrays[name]))
    if not is_writer:
        collections.deque(chunks, maxlen=0)
        return
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        _write_header(file, header)
        for name, chunk in chunks:
            values = np.asarray(jax.device_get(chunk)).astype(dtypes[name], order="C", copy=False)
            file.write(values.reshape(-1).view(np.uint8).data)


def _read_chunks(array: Any) -> Iterator[Any]:
    return array.read_chunks() if isinstance(array, StreamedArray) else iter((array,))


def load(path: str | os.PathLike, *, like: Any = None, dtype: Any = np.float32) -> Any:
    """Read the arrays of a file as a nested dictionary of NumPy arrays.

    Args:
      path: safetensors file from `save` or any other program; names without `/` give a flat dictionary.
      like: Tree of `jax.ShapeDtypeStruct` with the names and shapes that the file must have, and the structure of the
        result, in which the file's kernels (`nn.Kernel`) take the place of arrays.
      dtype: Dtype that floating arrays are cast to (bfloat16 to float32 is exact); None keeps the file's.

    Raises:
      MissingError: If the file does not exist.
      UserError: If the file is pickled, truncated, corrupt or quantized, or its tensors do not match `like`.
    """
    path = Path(path)
    arrays: dict[str, np.ndarray] = {}
    with open_safetensors(path) as file:
        names = list(file.keys())
        check_not_quantized(path, {name: file.get_slice(name).get_dtype() for name in names})
        if like is not None:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
            like = add_kernels(like, shapes, file.metadata() or {})
            expected = {name: tuple(leaf.shape) for name, leaf in trees.flatten(like).items()}
            check_tensors_match(path, shapes, expected)
        for name in names:
            try:
                array = file.get_tensor(name)
            except AttributeError as error:
                raise make_dtype_error(path, error) from error
            arrays[name] = array.astype(cast_dtype(array.dtype, dtype), copy=False)
    if like is None:
        return trees.unflatten(arrays)
    return trees.map_with_path(lambda name, _: arrays[name], like)


def load_shapes(path: str | os.PathLike) -> dict[str, tuple[int, ...]]:
    """Read the names and shapes of a file's arrays from its header.

    Raises:
      MissingError: If the file does not exist.
      UserError: If the file is pickled, truncated or corrupt.
    """
    with open_safetensors(Path(path)) as file:
        names = list(file.keys())
        return {name: tuple(file.get_slice(name).get_shape()) for name in names}


def load_metadata(path: str | os.PathLike) -> dict[str, str]:
    """Read the metadata in a file's header.

    Raises:
      MissingError: If the file does not exist.
      UserError: If the file is pickled, truncated or corrupt.
    """
    with open_safetensors(Path(path)) as file:
        return dict(file.metadata() or {})


@contextlib.contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """Open a file with the safetensors library, which checks that it is complete.

    Raises:
      MissingError: If the file does not exist.
      UserError: If the file is pickled, truncated or corrupt.
    """
    check_safetensors_file(path)
    try:
        with safetensors.safe_open(os.fspath(path), framework="np") as file:
            yield file
    except safetensors.SafetensorError as error:
        size, expected = path.stat().st_size, _read_expected_size(path)
        is_cut = expected is not None and size < expected
        reason = f"it has {size} of the {expected} bytes that its header says" if is_cut else error
        raise make_corrupt_error(path, reason) from error


def _read_expected_size(path: Path) -> int | None:
    """Return the size in bytes that a file's header implies; None if the header itself is truncated or damaged."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(min(length, _MAX_HEADER_BYTES))
    try:
        entries = json.loads(text)
        ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
    except (ValueError, TypeError, AttributeError, LookupError):
        return None
    return 8 + length + max(ends, default=0)


def cast_dtype(dtype: Any, floating_dtype: Any) -> np.dtype:
    """Return an array's dtype after casting floating arrays to `floating_dtype`; None casts none."""
    return np.dtype(dtype if floating_dtype is None or not jnp.issubdtype(dtype, jnp.floating) else floating_dtype)


def _write_header(file: BinaryIO, header: dict[str, Any]) -> None:
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)


def check_safetensors_file(path: Path) -> None:
    """Check that a file exists and is not a pickle, as reading a pickle can run any code.

    Raises:
      MissingError: If the file does not exist, or is only a pointer of Git LFS.
      UserError: If the file is pickled.
    """
    if not path.is_file():
        raise MissingError(f"no such file: {path}. Use the path of a .safetensors file")
    with path.open("rb") as file:
        start = file.read(len(_LFS_POINTER))
    if start == _LFS_POINTER:
        raise MissingError(f"{path} is a pointer of Git LFS, without the weights. Use git lfs pull in its folder")
    # A pickle of protocol 2 to 5 starts with 0x80 and the protocol's number. So does a safetensors file whose header
    # has, say, 640 bytes, but its ninth byte is the brace that opens the JSON.
    pickled = start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05") and start[8:9] != b"{"
    if path.suffix.lower() in _PICKLE_SUFFIXES or pickled or start[:4] == b"PK\x03\x04":
        raise UserError(
            f"{path} is a pickled file, which can run any code when it is read. Convert it where torch is installed: "
            'python -c "import torch, safetensors.torch as s; '
            f"s.save_file(torch.load('{path.name}', weights_only=True), '{path.stem}.safetensors')\""
        )


def check_tensors_match(
    path: Path,
    actual: dict[str, tuple[int, ...]],
    expected: dict[str, tuple[int, ...]],
    *,
    fix: str = "use the config it was made with",
) -> None:
    """Check that a file has the expected tensors; `fix` is the end of the error message.

    Raises:
      UserError: If tensors are missing, unexpected or misshapen; one error lists all three kinds.
    """
    missing = [name for name in expected if name not in actual]
    unexpected = sorted(actual.keys() - expected.keys())
    misshapen = [
        f"{name} {list(actual[name])} instead of {list(expected[name])}"
        for name in expected
        if name in actual and actual[name] != expected[name]
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
    if any(kinds.values()):
        parts = [f"{len(names)} {kind} ({format_names(names)})" for kind, names in kinds.items() if names]
        raise UserError(f"{path} does not fit the model. Tensors: {'; '.join(parts)}; {fix}")


def format_names(names: list[str]) -> str:
    """Return the first names, comma-separated, and the number of the remaining ones."""
    more = [f"… {len(names) - _MAX_LISTED} more"] if len(names) > _MAX_LISTED else []
    return ", ".join(names[:_MAX_LISTED] + more)


_SCALES = (".scale_weight", ".weight_scale", ".scale_input", ".input_scale", "scaled_fp8")
"""Ends of the names of tensors that only files of scaled float8 have (ComfyUI, vLLM)."""


def check_not_quantized(path: Path, dtypes: Mapping[str, str]) -> None:
    """Check that no weights are in float8 or integers, by the dtypes of a file's header; each may have its own scale.

    Raises:
      UserError: If there are such weights, or their scales: without these the weights would be other ones.
    """
    scales = [name for name in dtypes if name.endswith(_SCALES)]
    integers = [name for name, dtype in dtypes.items() if name.endswith(".weight") and dtype.startswith(("I", "U"))]
    if scales:
        kind = f"scaled float8 (fp8), with scales such as {scales[0]}"
    elif any(dtype.startswith("F8") for dtype in dtypes.values()):
        kind = "float8 (fp8)"
    elif integers:
        kind = f"integers ({dtypes[integers[0]]}), such as {integers[0]}"
    else:
        return
    raise UserError(f"{path} has its weights in {kind}, which is not supported. Use the file in bfloat16 or float16")


def make_dtype_error(path: Path, error: object) -> UserError:
    """Return the error for a dtype that NumPy lacks."""
    return UserError(f"{path} has a dtype that is not supported ({error}). Convert it to bfloat16 first")


def make_corrupt_error(path: Path, error: object) -> UserError:
    """Return the error for a damaged file."""
    return UserError(f"{path} is not a complete safetensors file ({error}). Copy or download it again")
