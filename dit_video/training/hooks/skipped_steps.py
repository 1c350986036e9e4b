"""The steps of a run that were skipped, and which batches they had."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from dit_video.core.files import write_text
from dit_video.core.typing import AnyArray
from dit_video.tokens import Rows


class SkippedLog:
    """JSON lines, `{"step": 20, "loss": "nan", "gradient_norm": "inf", "examples": [[5, 6], …], …}`."""

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)

    def resume(self, step: int) -> None:
        """Drop what lies after `step`, and a half-written last line."""
        if jax.process_index() == 0 and self.path.is_file():
            *whole, _half = self.path.read_text(encoding="utf-8").split("\n")
            write_text(self.path, "".join(f"{line}\n" for line in whole if json.loads(line)["step"] <= step))

    def write(self, step: int, metrics: Mapping[str, Any], batch: Mapping[str, AnyArray]) -> None:
        """Append one; all processes call this, each with its part of the batch's arrays."""
        arrays = {name: _whole(array).tolist() for name, array in batch.items()}
        if jax.process_index():
            return
        said = {name: _number(metrics[name]) for name in ("loss", "gradient_norm") if name in metrics}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **said, **arrays}) + "\n")


def examples_of(batch: Any) -> dict[str, AnyArray]:
    """Of packed rows the ranks of their examples in the plan of the epochs, `[B G]`, and which of them exist."""
    return {"examples": batch.examples, "valid": batch.valid} if isinstance(batch, Rows) else {}


def _whole(array: AnyArray) -> np.ndarray:
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


def _number(value: Any) -> float | str:
    """JSON has neither NaN nor infinity."""
    return float(value) if np.isfinite(value) else str(float(value))
