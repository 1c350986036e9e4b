"""Log of a run's skipped steps and their batches."""

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
from dit_video.tokens import PackedBatch
from dit_video.training.hooks.hook import Hook


class SkippedLog(Hook):
    """Log of skipped steps, lines `{"step": 20, "loss": "nan", "gradient_norm": "inf", "examples": [[5, 6], …], …}`."""

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)

    def resume(self, step: int) -> None:
        """Remove the entries after `step`, and a half-written last line."""
        if jax.process_index() == 0 and self.path.is_file():
            *complete_lines, _incomplete_line = self.path.read_text(encoding="utf-8").split("\n")
            write_text(self.path, "".join(f"{line}\n" for line in complete_lines if json.loads(line)["step"] <= step))

    def identify(self, batch: Any) -> Mapping[str, AnyArray]:
        """Return the ranks in the data plan of the examples of packed rows, `[B G]`, and which of them are valid."""
        return {"examples": batch.examples, "valid": batch.valid} if isinstance(batch, PackedBatch) else {}

    def on_skip(self, step: int, metrics: Mapping[str, Any], batch_ids: Mapping[str, AnyArray]) -> None:
        """Append one entry; all processes call this, each with its part of the batch's arrays."""
        arrays = {name: _gather(array).tolist() for name, array in batch_ids.items()}
        if jax.process_index():
            return
        values = {name: float(metrics[name]) for name in ("loss", "gradient_norm") if name in metrics}
        # JSON represents neither NaN nor infinity.
        logged = {name: value if np.isfinite(value) else str(value) for name, value in values.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **logged, **arrays}) + "\n")


def _gather(array: AnyArray) -> np.ndarray:
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)
