"""Weight files with real headers and without weights: sparse files of the real size."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from huggingface_hub import split_state_dict_into_shards_factory

Shapes = Mapping[str, tuple[int, ...]]
_ITEM_BYTES = {"F32": 4, "BF16": 2}


def write_skeleton(
    folder: Path,
    stem: str,
    shapes: Shapes,
    *,
    dtype: Literal["F32", "BF16"] = "F32",
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Write `stem.safetensors`, or several files with an index, byte for byte as Hugging Face's libraries write them.

    All weights are zeros that take no room on the disk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    split = split_state_dict_into_shards_factory(
        dict(shapes),
        get_storage_size=lambda shape: math.prod(shape) * _ITEM_BYTES[dtype],
        filename_pattern=f"{stem}{{suffix}}.safetensors",
        max_shard_size=shard_bytes,
    )
    for file, names in split.filename_to_tensors.items():
        _write_file(folder / file, {name: shapes[name] for name in names}, dtype)
    if split.is_sharded:
        metadata = {"total_size": split.metadata["total_size"]}
        document = {"metadata": metadata, "weight_map": split.tensor_to_filename}
        write_document(folder / f"{stem}.safetensors.index.json", document)


def write_document(path: Path, document: object) -> None:
    """Write a JSON file as Hugging Face's libraries do."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_file(path: Path, shapes: Shapes, dtype: str) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(shapes):
        start, end = end, end + math.prod(shapes[name]) * _ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shapes[name]), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
