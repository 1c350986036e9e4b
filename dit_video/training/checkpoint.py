"""Checkpoints of a training state: saved in the background, restored bit for bit, onto any mesh.

A checkpoint holds a nested dictionary of arrays, named by their paths in the state, and no type of Flax, optax or this
package. A JSON document is stored with the arrays: the number of the format, each array's shape, dtype and digest, the
metrics at the time of saving, the code version and metadata of the caller. (The trainer stores the resolved config and
the hash of the data plan, which together with the step is the whole state of the data.) Digests are verified after
reading, so lost or changed bytes are detected. A checkpoint is written to a temporary folder that is then renamed, so
that it is either complete or absent.

Storage that does not answer ends a run with a `TransientError`, so that it is started again; reads, and the saves of a
single process, are repeated before that. In a run of several processes all restore the same step: the first process
lists the steps, and a checkpoint counts as readable once all processes have read their parts of it.
"""

import contextlib
import errno
import json
import math
import os
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from dit_video.core import config_json, trees
from dit_video.core.errors import MissingError, TransientError, UserError, check_at_least
from dit_video.core.platform.provenance import get_code_version
from dit_video.core.storage import classify_read_error, retry_transient
from dit_video.distributed.faults.progress import declare_phase
from dit_video.distributed.process_group import ProcessGroup
from dit_video.training.agreement import SharedResult, call_together, check_is_not_in_turn, raise_failure, share_text
from dit_video.training.checkpoint_io import (
    SaveBarrier,
    check_arrays,
    convert_save_errors,
    create_folder,
    describe_array,
    make_target,
    open_reader,
    open_writer,
    rename_unreadable,
    resolve_folder,
)
from dit_video.training.digests import compute_digests
from dit_video.training.folder_lock import check_locks


@dataclass(frozen=True, kw_only=True)
class CheckpointPolicy:
    """Policy for preserving checkpoints: one that matches any of the rules is kept.

    Raises:
      UserError: If a number is too small.
    """

    newest: int = 2
    """Number of newest checkpoints to keep. Use at least 2 to have a fallback if the newest one is damaged."""
    every: int | None = None
    """Interval in steps of checkpoints that are kept forever; None for none."""
    best: int = 0
    """Number of best checkpoints by `metric` to keep."""
    metric: str = "loss"
    """Name of a logged metric, as in the last entry of the log before the checkpoint was saved."""
    better: Literal["lower", "higher"] = "lower"
    """Direction in which `metric` improves."""

    def __post_init__(self) -> None:
        check_at_least(1, newest=self.newest, every=self.every)
        check_at_least(0, best=self.best)


FORMAT = 2


class Checkpoints:
    """The checkpoints of one run, in one folder; `keep` decides which are preserved.

    The folder is neither created nor changed before the first save. In a run of several processes all call the same
    methods, in the same order (`read_document` is of each process alone).
    """

    def __init__(self, folder: str | os.PathLike, *, keep: CheckpointPolicy = CheckpointPolicy()) -> None:
        self.folder = resolve_folder(folder)
        self.keep = keep
        self._writer: ocp.CheckpointManager | None = None
        self._barrier: SaveBarrier | None = None
        self._listed: set[int] | None = None
        """Steps in the folder when it was listed; None if it was not, or if a save has begun since."""
        self._unreadable: set[int] = set()
        self._pending: _Save | None = None
        self._failed_saves = 0
        """Number of the newest saves in a row that were not written."""
        self._metrics: dict[int, Mapping[str, float] | None] = {}

    def save(
        self, step: int, state: Any, meta: Mapping[str, Any], *, metrics: Mapping[str, float] | None = None
    ) -> dict[str, int]:
        """Copy `state` (a tree of JAX arrays) to the host and write it in the background; it may be donated at once.

        A single process whose previous save was not written, because its storage did not answer, warns and saves this
        state instead; if that happens twice in a row, it raises an error.

        Args:
          step: Number of steps that led to the state. Steps are saved in increasing order.
          state: Tree of JAX arrays.
          meta: Metadata that JSON can represent; tuples are restored as lists.
          metrics: Metrics by which the best checkpoints are selected.

        Returns:
          The digest of each array, by its path.

        Raises:
          UserError: If the folder already has a checkpoint of this step or a later one, or this or the previous save
            cannot be written (disk full, no permission).
          TransientError: If this or the previous save cannot be written now (storage not reachable); or if another run
            has taken over a folder that this process has locked.
          TypeError: If JSON cannot represent `meta`.
        """
        check_locks()
        self._finish_previous(step)
        arrays = trees.flatten(state)
        digests = compute_digests(arrays)
        table = {path: {**describe_array(array), "digest": digests[path]} for path, array in arrays.items()}
        self._metrics[step] = {name: float(value) for name, value in (metrics or {}).items() if math.isfinite(value)}
        details = {"metrics": self._metrics[step], "code": get_code_version(), "meta": dict(meta)}
        document = json.loads(json.dumps({"format": FORMAT, "arrays": table, **details}))
        self._begin_save(step, arrays, document)
        return digests

    def wait(self) -> None:
        """Wait until all saves are on disk, and raise their errors.

        If the storage of a single process did not answer, the newest state is written again unless it was donated.
        """
        pending = self._pending
        with declare_phase("save"):
            try:
                self._wait()
            except TransientError:
                if jax.process_count() > 1 or pending is None or (arrays := pending.get_arrays()) is None:
                    raise
                self._begin_save(pending.step, arrays, pending.document)
                self._wait()

    def check(self) -> None:
        """Raise the error of a save that has failed in the background, if there are several processes.

        They cannot save without the one that failed, so they need not train to the next save. A single process can.
        """
        if self._barrier is not None and self._barrier.has_failed:
            self._wait()

    def _begin_save(self, step: int, arrays: Mapping[str, jax.Array], document: Mapping[str, Any]) -> None:
        """Copy arrays to the host, and start to write them.

        A single process tries again if its storage does not answer. Several processes meet while they save, so that
        none of them can begin again alone.
        """
        with convert_save_errors(step, self.folder):
            if jax.process_count() == 1:
                retry_transient(lambda: self._try_to_save(step, arrays, document))
            else:
                self._try_to_save(step, arrays, document)
        self._pending = _Save(step, {path: weakref.ref(array) for path, array in arrays.items()}, document)

    def _try_to_save(self, step: int, arrays: Mapping[str, jax.Array], document: Mapping[str, Any]) -> None:
        try:
            self._listed = None
            writer = self._open_writer()
            self._remove_unreadable(writer)
            newest = writer.latest_step()
            if newest is not None and newest >= step:
                raise UserError(
                    f"cannot save step {step} to {self.folder}: the folder already has a checkpoint of step {newest}. "
                    f"Continue from step {newest}, remove it, or use another folder."
                )
            args = ocp.args.Composite(
                # Orbax cannot write an array without values; its shape and dtype are in the table.
                state=ocp.args.StandardSave(trees.unflatten({path: a for path, a in arrays.items() if a.size})),
                meta=ocp.args.JsonSave(document),
            )
            if not writer.save(step, args=args, force=True):
                raise RuntimeError(f"the checkpoint of step {step} was not saved")
        except Exception:
            self._discard_writer()
            raise

    def _remove_unreadable(self, writer: ocp.CheckpointManager) -> None:
        """Rename the checkpoints that could not be read, for a person to look at; delete them at an address."""
        steps = sorted(self._unreadable & set(writer.all_steps()))
        if not steps:
            self._unreadable.clear()
            return
        if "://" in str(self.folder):
            for step in steps:
                writer.delete(step)
        else:
            is_first = ProcessGroup.get_current().is_first
            action = "rename unreadable checkpoints"
            result = call_together(action, lambda: rename_unreadable(self.folder, steps) if is_first else None)
            if result.kind != "none":
                raise_failure(f"{action} in {self.folder}", result)
            writer.reload()
        self._unreadable.clear()

    def _finish_previous(self, step: int) -> None:
        """Wait for the previous save. One that was not written is given up once, in favour of the save of `step`."""
        try:
            self._wait()
        except TransientError as error:
            self._failed_saves += 1
            if self._failed_saves > 1 or jax.process_count() > 1:
                raise
            warnings.warn(f"{error} This run goes on, and saves step {step} instead.", stacklevel=3)
        else:
            self._failed_saves = 0

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if self._writer is None:
            return
        try:
            with convert_save_errors(pending.step if pending else 0, self.folder):
                self._writer.wait_until_finished()
        except Exception:
            self._discard_writer()
            raise

    def _discard_writer(self) -> None:
        """Forget the writing manager after an error. The next one removes what this one has left behind."""
        writer, self._writer = self._writer, None
        if writer is not None and jax.process_count() == 1:  # several processes would meet
            with contextlib.suppress(Exception):
                writer.close()

    def latest(self) -> int | None:
        """Return the step of the newest complete checkpoint that is not known to be unreadable, or None.

        All processes call this together (see `list_steps`).
        """
        return max(self.list_steps(), default=None)

    def read_document(self, step: int) -> dict[str, Any]:
        """Return the JSON document of a checkpoint: `metrics`, `code` (see `get_code_version`), `meta`, `arrays`."""
        with open_reader(self.folder) as reader:
            return reader.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta

    def read_digests(self, step: int) -> dict[str, int]:
        """Return the digest of each array of a checkpoint, by its path, as `save` does."""
        document = retry_transient(lambda: self.read_document(step))
        return {path: entry["digest"] for path, entry in document["arrays"].items()}

    def restore(self, like: Any, step: int | None = None, *, config: Any = None) -> tuple[Any, dict[str, Any]]:
        """Read a state and its `meta`, of one step or of the newest checkpoint that can be read.

        All processes call this together. Newer checkpoints that cannot be read (half written, damaged) are skipped with
        a warning, by all processes if one of them cannot read its part. The next save renames them to
        `STEP.unreadable`; at an address, where that would copy them, it removes them. Storage that does not answer is
        no damage.

        Args:
          like: Tree of `jax.ShapeDtypeStruct` with shardings, which gives the structure and the layout of the result.
            Leaves without a sharding are put on the first device.
          step: Step of the checkpoint; None for the newest that can be read.
          config: Resolved config of this run, as JSON. If the arrays do not match `like`, the error names the fields in
            which it differs from the config of the checkpoint, `meta["config"]`.

        Raises:
          MissingError: If there is no checkpoint, or none of this step.
          UserError: If the checkpoint has another config or format, access is denied, or nothing can be read.
          TransientError: If the storage does not answer, in one of the processes.
          RuntimeError: If it is called in a block of `main_process_first`, or if the processes call different methods.
        """
        steps = sorted(self.list_steps(), reverse=True)
        if not steps or (step is not None and step not in steps):
            which = "no checkpoint" if step is None else f"no checkpoint of step {step}"
            has = f" Available steps: {', '.join(map(str, reversed(steps)))}." if steps else " Train first."
            raise MissingError(f"{which} in {self.folder}.{has}")
        reason, problem = "", None
        for candidate in steps if step is None else [step]:
            with declare_phase("restore"):
                result = self._read_together(candidate, like, config)
            if result.value is not None:
                if reason:
                    warnings.warn(
                        f"checkpoint {', '.join(map(str, sorted(self._unreadable)))} in {self.folder} cannot be read "
                        f"({reason}); continuing from step {candidate}",
                        stacklevel=2,
                    )
                return result.value
            reason, problem = result.reason, result.error
            if step is None:
                self._unreadable.add(candidate)
        which = "any checkpoint" if step is None else f"step {step}"
        raise UserError(f"cannot read {which} in {self.folder} ({reason}). Remove the folder to restart.") from problem

    def _read_together(self, step: int, like: Any, config: Any) -> SharedResult[tuple[Any, dict[str, Any]]]:
        """Read a checkpoint in all processes; its result has no value if the checkpoint is damaged for one of them.

        Until all have read their arrays, no process waits for another except here. Digests of arrays on several
        devices are computed by all processes together, so they come after that.
        """
        content = call_together(
            f"read checkpoint {step}", lambda: retry_transient(lambda: self._read(step, like, config))
        )
        if content.value is not None and content.kind == "none":
            arrays, document = content.value
            digests = call_together(f"check checkpoint {step}", lambda: _check_digests(arrays, document))
            if digests.kind == "none":
                return SharedResult((trees.map_with_path(lambda path, _: arrays[path], like), document["meta"]))
            content = SharedResult(None, digests.kind, digests.reason, digests.error)
        if content.kind != "damage":
            raise_failure(f"read the checkpoint of step {step} in {self.folder}", content)
        return SharedResult(None, content.kind, content.reason, content.error)

    def _read(self, step: int, like: Any, config: Any) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        """Return the arrays by their paths, each with this process's part, and the document."""
        checkpoint_path = self.folder / str(step)
        if not checkpoint_path.exists():  # on a network disk one machine may see a folder before another one does
            raise OSError(errno.ESTALE, f"{checkpoint_path} is listed, but cannot be seen")
        document = self.read_document(step)
        if document.get("format") != FORMAT:
            raise UserError(
                f"{checkpoint_path} has checkpoint format {document.get('format')}, but this version reads {FORMAT}. "
                "Use the version that wrote it."
            )
        expected = {path: make_target(leaf) for path, leaf in trees.flatten(like).items()}
        fields = "" if config is None else config_json.describe_difference(document["meta"].get("config"), config)
        check_arrays(checkpoint_path, document["arrays"], expected, fields)
        empty = {path: jnp.zeros(leaf.shape, leaf.dtype) for path, leaf in expected.items() if 0 in leaf.shape}
        args = ocp.args.StandardRestore(trees.unflatten({path: s for path, s in expected.items() if path not in empty}))
        with open_reader(self.folder) as reader:
            return empty | trees.flatten(reader.restore(step, args=ocp.args.Composite(state=args)).state), document

    def list_steps(self) -> set[int]:
        """Return the steps of complete checkpoints that are not known to be unreadable, as the first process sees them.

        All processes call this together. Once this object writes checkpoints, they are those that it knows of; before
        that, those of the first call.

        Raises:
          RuntimeError: If it is called in a block of `main_process_first`.
          TransientError: If the storage does not answer.
        """
        check_is_not_in_turn("list checkpoints")
        self.wait()
        if self._writer is not None:
            return set(self._writer.all_steps()) - self._unreadable
        if self._listed is None:
            # The first process of the meeting, whose text all take, need not be that which JAX's devices number 0.
            is_first = ProcessGroup.get_current().is_first
            listing = call_together("list checkpoints", lambda: retry_transient(self._read_steps) if is_first else [])
            if listing.kind != "none":
                raise_failure(f"read the list of checkpoints in {self.folder}", listing)
            self._listed = set(json.loads(share_text("list checkpoints", json.dumps(listing.value))))
        return self._listed - self._unreadable

    def _read_steps(self) -> list[int]:
        if not self.folder.is_dir():
            return []
        with open_reader(self.folder) as reader:
            return sorted(reader.all_steps())

    def _open_writer(self) -> ocp.CheckpointManager:
        """Return the writing manager, which removes the remains of interrupted saves; only the run itself may do so."""
        if self._writer is None:
            create_folder(self.folder)
            self._barrier = SaveBarrier() if jax.process_count() > 1 else None
            policy = OrbaxPreservationPolicy(self.keep, self._get_metrics)
            self._writer = open_writer(self.folder, policy, self._barrier)
        return self._writer

    def _get_metrics(self, step: int) -> Mapping[str, float] | None:
        """Return the metrics stored with a checkpoint; None if its document cannot be read."""
        if step not in self._metrics:
            try:
                self._metrics[step] = retry_transient(lambda: self.read_document(step)).get("metrics")
            except Exception as error:
                if classify_read_error(error) != "damage":  # otherwise one of the best might be removed
                    raise
                self._metrics[step] = None  # a damaged file, see `restore`
        return self._metrics[step]


@dataclass(frozen=True)
class _Save:
    """A save that was begun."""

    step: int
    """Number of steps that led to the state."""
    references: dict[str, Any]
    """Weak references to the arrays, by their paths; a training step may donate them."""
    document: Mapping[str, Any]

    def get_arrays(self) -> dict[str, jax.Array] | None:
        """Return the arrays; None if some were freed or donated."""
        arrays = {path: reference() for path, reference in self.references.items()}
        return None if any(array is None or array.is_deleted() for array in arrays.values()) else arrays


def _check_digests(arrays: Mapping[str, jax.Array], document: Mapping[str, Any]) -> None:
    for path, digest in compute_digests(arrays).items():
        if digest != document["arrays"][path]["digest"]:
            raise ValueError(f"the digest of {path} does not match: its values were lost or changed after writing")


class OrbaxPreservationPolicy:
    """A `CheckpointPolicy` as a policy of Orbax.

    `get_metrics` returns the metrics of the checkpoint of a step, or None.
    """

    def __init__(self, keep: CheckpointPolicy, get_metrics: Callable[[int], Mapping[str, float] | None]) -> None:
        from orbax.checkpoint import checkpoint_managers as orbax  # slow import, not needed for configs

        policies: list[orbax.PreservationPolicy] = [orbax.LatestN(keep.newest)]
        if keep.every is not None:
            policies.append(orbax.EveryNSteps(keep.every))
        if keep.best:
            is_reversed = keep.better == "lower"  # Orbax keeps the last of the sorted checkpoints
            options: dict[str, Any] = {"reverse": is_reversed, "keep_checkpoints_without_metrics": False}
            policies.append(orbax.BestN(get_metric_fn=lambda metrics: metrics[keep.metric], n=keep.best, **options))
        self._policy = orbax.AnyPreservationPolicy(policies)
        self._keep = keep
        self._get_metrics = get_metrics

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """Return whether to keep each of the checkpoints, which are in the order of their steps."""
        checkpoints_with_metrics = [
            SimpleNamespace(step=info.step, time=info.time, metrics=self._read_metrics(info.step))
            for info in checkpoints
        ]
        return self._policy.should_preserve(checkpoints_with_metrics, context=context)

    def _read_metrics(self, step: int) -> Mapping[str, float] | None:
        if not self._keep.best:
            return None
        metrics = self._get_metrics(step)
        value = None if metrics is None else metrics.get(self._keep.metric)
        return metrics if value is not None and math.isfinite(value) else None
