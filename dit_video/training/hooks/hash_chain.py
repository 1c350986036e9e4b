"""Hash chain of a training: what it computed, step by step, so that any stretch can be replayed and compared.

`hash_chain.jsonl` has a record for each start (versions of the code, devices, mesh, plan of the data), for each step
(digests of the batch's arrays, the bits of loss and gradient norm) and for each saved state (digests of its arrays).
Each record ends with a hash of itself and of the record before, so that a damaged or edited file is noticed. Digests do
not depend on the mesh (see `digests`). `experiment.replay` compares them.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from dit_video.core.errors import MissingError, UserError
from dit_video.training.hooks.hook import Hook
from dit_video.training.step import BATCH_DIGESTS

CHAIN_FILE = "hash_chain.jsonl"
_FIRST_LINK = "0" * 32
_VALUES = ("loss", "gradient_norm")
"""Metrics of each step that are recorded."""

Record = dict[str, Any]


class HashChain(Hook):
    """Writer of the hash chain, in the first process."""

    first_process_only = True

    def __init__(
        self, path: str | os.PathLike, start: Mapping[str, Any], *, read_digests: Callable[[int], Mapping[str, int]]
    ) -> None:
        """Name the file.

        Args:
          path: File of the chain.
          start: What is recorded of each start, as JSON.
          read_digests: Function from the step of a checkpoint to the digests of its arrays, by their paths.
        """
        self.path = Path(path)
        self._start = dict(start)
        self._read_digests = read_digests
        self._link = _FIRST_LINK
        self._steps: list[tuple[int, Mapping[str, Any]]] = []

    def resume(self, step: int) -> None:
        """Remove the records after `step`, which the run writes again, and record the start.

        If the record of the state is missing, as a machine was lost after its checkpoint was complete and before the
        chain was sent, it is made from that checkpoint.
        """
        self._link, size, has_state = _FIRST_LINK, 0, False
        try:
            for record, end in _iterate_chain(self.path):
                if record["step"] > step:
                    break
                self._link, size = record["link"], end
                has_state |= record["step"] == step and "state" in record
            os.truncate(self.path, size)
        except MissingError:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except UserError as error:  # it is for later checks, and no reason not to train
            damaged = self.path.with_suffix(f".damaged-{step}.jsonl")
            self.path.rename(damaged)
            warnings.warn(f"{error} It is {damaged.name} now; a new chain begins.", stacklevel=2)
            self._link, has_state = _FIRST_LINK, False
        if step and not has_state:
            self.on_save(step, self._read_digests(step))
        self._append([{"step": step, "start": self._start}])

    def on_step(self, step: int, state: Any, metrics: Mapping[str, Any]) -> None:
        recorded = (BATCH_DIGESTS, *_VALUES)  # a step of another package may lack some
        self._steps.append((step, {name: metrics[name] for name in recorded if name in metrics}))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._flush()

    def before_save(self, step: int, state: Any) -> None:
        self._flush()

    def on_save(self, step: int, digests: Mapping[str, int]) -> None:
        self._append([{"step": step, "state": {path: f"{digest:08x}" for path, digest in digests.items()}}])

    def close(self) -> None:
        self._flush()

    def _flush(self) -> None:
        steps, self._steps = self._steps, []
        self._append([make_step_record(step, metrics) for step, metrics in jax.device_get(steps)])

    def _append(self, records: Sequence[Record]) -> None:
        lines = []
        for record in records:
            self._link = compute_link(self._link, record)
            lines.append(json.dumps({**record, "link": self._link}) + "\n")
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(lines))


def make_step_record(step: int, metrics: Mapping[str, Any]) -> Record:
    """Return the record of a step, numbered from 1, from its metrics on the host."""
    batch = {path: f"{int(digest):08x}" for path, digest in metrics.get(BATCH_DIGESTS, {}).items()}
    # Hexadecimal, as decimal digits would round.
    return {"step": step, "batch": batch, **{name: float(metrics[name]).hex() for name in _VALUES if name in metrics}}


def compute_link(previous: str, record: Mapping[str, Any]) -> str:
    """Return the hash of a record without its `link`, and of the link before it, as 32 hexadecimal digits."""
    content = json.dumps({name: value for name, value in record.items() if name != "link"}, sort_keys=True)
    return hashlib.sha256(f"{previous}{content}".encode()).hexdigest()[:32]


def read_chain(path: str | os.PathLike) -> list[Record]:
    """Return the records of a hash chain, without a half-written last line.

    Raises:
      MissingError: If the file does not exist.
      UserError: If a line before the last is not a record, or was changed, left out or added after it was written.
    """
    return [record for record, _ in _iterate_chain(Path(path))]


def _iterate_chain(path: Path) -> Iterator[tuple[Record, int]]:
    """Yield the records of a hash chain, each with its end in bytes from the start of the file."""
    if not path.is_file():
        raise MissingError(f"{path} does not exist. Use a run that was trained with this version or a later one.")
    link, end = _FIRST_LINK, 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return  # half-written
            try:
                record = json.loads(line)
                link, stored = compute_link(link, record), record["link"]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{path} line {number} is not a record of a hash chain. Restore the file.") from error
            if link != stored:
                rule = "a line up to there was changed, left out or added after it was written"
                raise UserError(f"{path} line {number} has the hash {stored}, not {link}: {rule}. Restore the file.")
            end += len(line)
            yield record, end
