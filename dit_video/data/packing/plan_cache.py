"""Plans of epochs that are made once, for all threads and worker processes, before they are needed."""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from dit_video.core.files import atomic_path
from dit_video.core.shared_array import get_shared_folder, map_array
from dit_video.data.packing.bin_packing import RowArrays

KEPT_PLANS = 3
"""Number of plans that are kept: those of the epoch that is read, of the next one, and of the one before."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class RowPlan:
    """The rows of one epoch."""

    order: Int[np.ndarray, " n"]
    """Indices of the examples, row after row."""
    offsets: Int[np.ndarray, " R1"]
    """Start of each row in `order`, then the end: row r holds `order[offsets[r]:offsets[r + 1]]`."""
    padding: float
    """Share of video tokens that are padding."""
    attention_cost: Float[np.ndarray, " R"]
    """Token pairs in the attention of each row, in millions: proportional to the cost of attention."""
    dropped_examples: Int[np.ndarray, " d"]
    """Indices of a mixture's examples that had no room in this epoch."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def get_row(self, index: int) -> Int[np.ndarray, " G"]:
        """Return the examples of one row."""
        return self.order[self.offsets[index] : self.offsets[index + 1]]

    @property
    def rows(self) -> list[list[int]]:
        """Return the examples of every row."""
        return RowArrays(self.order, self.offsets).to_lists()

    @functools.cached_property
    def hash(self) -> str:
        """Return a hash that is equal for equal plans."""
        content = self.order.astype("<i8").tobytes() + self.offsets.astype("<i8").tobytes()
        return hashlib.sha256(content).hexdigest()[:16]

    def save(self, folder: Path) -> None:
        """Write the plan to a new folder, which is complete or absent."""
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            for field in dataclasses.fields(self):
                np.save(temporary / f"{field.name}.npy", getattr(self, field.name))

    @classmethod
    def load(cls, folder: Path) -> "RowPlan":
        """Return the plan of a folder, whose arrays are mapped."""
        values: dict[str, Any] = {
            field.name: map_array(folder / f"{field.name}.npy") for field in dataclasses.fields(cls)
        }
        return cls(**{**values, "padding": float(values["padding"])})


class PlanCache:
    """The most recent plans of a sequence of epochs.

    A plan is made by one thread, while others wait for it. Processes that the cache is pickled to use the plans that
    one of them has made, in a folder that they share.

    Args:
      make: function from an epoch to its plan.
    """

    def __init__(self, make: Callable[[int], RowPlan]):
        self._make = make
        self._folder: Path | None = None
        """Folder of the plans that processes share; None before the cache is pickled."""
        self._plans: dict[int, RowPlan] = {}
        self._prepared = -1
        self._lock = threading.Lock()

    def get(self, epoch: int) -> RowPlan:
        """Return the plan of an epoch."""
        plan = self._plans.get(epoch)  # without the lock, so that no thread waits for a plan that exists
        if plan is not None:
            return plan
        with self._lock:
            if epoch not in self._plans:
                self.put(epoch, self._make(epoch) if self._folder is None else self._get_shared(epoch))
            return self._plans[epoch]

    def put(self, epoch: int, plan: RowPlan) -> None:
        """Keep a plan, instead of the oldest one."""
        # A new dict: threads that read without the lock see either the old or the new one.
        self._plans = {**dict(list(self._plans.items())[1 - KEPT_PLANS :]), epoch: plan}

    def prepare(self, epoch: int) -> None:
        """Begin to make a plan in a thread, unless it exists or was begun."""
        if epoch not in self._plans and epoch != self._prepared:
            self._prepared = epoch
            threading.Thread(target=self.get, args=(epoch,), name=f"plan of epoch {epoch}", daemon=True).start()

    def __getstate__(self) -> dict[str, Any]:
        self._folder = self._folder or get_shared_folder() / uuid.uuid4().hex
        for epoch, plan in self._plans.items():
            with self._lock_folder(epoch) as folder:
                if not folder.exists():
                    plan.save(folder)
        return {"make": self._make, "folder": self._folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["make"])  # type: ignore[misc]
        self._folder = state["folder"]

    def _get_shared(self, epoch: int) -> RowPlan:
        with self._lock_folder(epoch) as folder:
            if not folder.exists():
                self._make(epoch).save(folder)
                with self._lock_folder(epoch - KEPT_PLANS) as old:
                    shutil.rmtree(old, ignore_errors=True)
            return RowPlan.load(folder)

    @contextlib.contextmanager
    def _lock_folder(self, epoch: int) -> Iterator[Path]:
        """Yield the folder of an epoch's plan, which no other process reads or writes meanwhile."""
        assert self._folder is not None
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / f"{epoch}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield self._folder / str(epoch)
