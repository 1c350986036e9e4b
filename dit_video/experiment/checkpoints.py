"""Checkpoints of a run that can be loaded, listed while another process trains."""

import contextlib
import functools
from pathlib import Path
from typing import NamedTuple

from dit_video.core.errors import UserError
from dit_video.core.files import read_json
from dit_video.core.storage import StoragePath, convert_storage_errors, to_storage_path
from dit_video.experiment import datasets
from dit_video.sampling.pipeline_config import RUN_CONFIG


class SavedCheckpoint(NamedTuple):
    """A complete checkpoint of a model."""

    step: int
    """Number of steps that led to it."""
    unix_seconds: float | None
    """Time at which it was written; None where the checkpoints lie at an address."""
    size: int | None
    """Size of its files in bytes; None where the checkpoints lie at an address."""


def get_checkpoint_folder(folder: Path, name: str) -> StoragePath:
    """Return the folder or address of a model's checkpoints in a run's folder, which need not exist yet.

    The name of a model in a nested run is `RUN/NAME`.
    """
    nested, _, name = name.rpartition("/")
    folder = folder / nested
    elsewhere = folder / "checkpoints"
    if elsewhere.is_symlink() or elsewhere.is_dir():
        return datasets.resolve(elsewhere) / name
    return folder / name / "checkpoints"


def find_sampled_model(folder: Path) -> str:
    """Return the name of the model whose checkpoints `dit_video.load` loads: the denoiser, or the last one's joined."""
    with contextlib.suppress(UserError, OSError, KeyError, TypeError, AttributeError):  # no run, or an unknown one
        for stage in read_json(folder / RUN_CONFIG)["experiment"]["stages"]:
            if stage["type"].endswith(":JoinPipelines"):
                last = stage["last"]
                return f"{last}/{find_sampled_model(folder / last)}"
    return "denoiser"


def list_checkpoints(folder: str | Path, name: str | None = None) -> tuple[SavedCheckpoint, ...]:
    """Return the complete checkpoints of a model of a run, by step; `dit_video.load(folder, step=…)` loads one.

    Only names and sizes of files are read, so that this is fast, and another process may train in the folder.

    Args:
      folder: Folder of the run.
      name: Name of the model, `RUN/NAME` of a nested run's; None for the one that is sampled.

    Raises:
      UserError: If the address of the checkpoints cannot be reached.
    """
    folder = Path(folder)
    place = to_storage_path(get_checkpoint_folder(folder, find_sampled_model(folder) if name is None else name))
    with convert_storage_errors(place), contextlib.suppress(FileNotFoundError, NotADirectoryError):
        # One that is being written has another name.
        entries = [entry for entry in place.iterdir() if entry.name.isdecimal()]
        return tuple(sorted(filter(None, map(_describe, entries))))
    return ()  # nothing was saved yet


def _describe(path: StoragePath) -> SavedCheckpoint | None:
    if not isinstance(path, Path):
        return SavedCheckpoint(int(path.name), None, None)
    try:
        unix_seconds = path.stat().st_mtime
        return SavedCheckpoint(int(path.name), unix_seconds, _measure_size(path, unix_seconds))
    except FileNotFoundError:  # it was just removed
        return None


@functools.lru_cache(maxsize=1024)  # a checkpoint does not change
def _measure_size(path: Path, _unix_seconds: float) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
