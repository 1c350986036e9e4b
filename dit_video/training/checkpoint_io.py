"""Contents and files of checkpoints: arrays with their digests, and how Orbax reads and writes them."""

import contextlib
import itertools
import logging
import os
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import SingleDeviceSharding

from dit_video.core.errors import TransientError, UserError
from dit_video.core.storage import classify_storage_error, convert_storage_errors, is_transient, retry_transient
from dit_video.distributed.faults.store import KeyValueStore
from dit_video.distributed.process_group import ProcessGroup
from dit_video.training.agreement import call_together, format_error, raise_failure

CheckpointFolder: TypeAlias = Path | epath.Path
"""A local folder, or one at an address that Orbax writes to."""

_SAVE_TIMEOUT = 3600
"""Seconds for all processes to write a checkpoint. One that fails leaves the run, which is noticed sooner."""
_MARKER = ".keep"
"""Name of the empty file by which a folder at an address exists."""
_ORBAX_FOLDER = os.path.dirname(ocp.__file__)


def _is_worth_telling(record: logging.LogRecord) -> bool:
    """Return False for the error of a save to a full disk, which every write that fails repeats with its traceback.

    The exception of a save is raised, too, where the save is waited for, and becomes one line.
    """
    error = record.exc_info[1] if record.exc_info else None
    return error is None or classify_storage_error(error) != "space"


def _shorten_log(record: logging.LogRecord) -> bool:
    """Drop what Orbax tells of its steps, and reduce its tracebacks to their last lines."""
    if not record.pathname.startswith(_ORBAX_FOLDER):
        return True
    if not _is_worth_telling(record):
        return False
    if record.exc_info:
        record.exc_text = "".join(traceback.format_exception_only(record.exc_info[1])).strip()
        record.exc_info = None
    return record.levelno >= logging.WARNING


logging.getLogger("absl").addFilter(_shorten_log)  # a logger that Orbax shares with other packages
logging.getLogger("asyncio").addFilter(_is_worth_telling)  # which tells of Orbax's futures


class IncompleteSaveError(Exception):
    """Raised in all processes if one could not write its part of a checkpoint."""


_barrier_numbers = itertools.count()


class SaveBarrier:
    """Barrier of the threads in which all processes write a checkpoint; it fails in all as soon as one has failed.

    A process that cannot write its part goes on to a later barrier. Those of Orbax would wait for it at the earlier one
    until the time for a save is over. Here the barriers are counted, and all compare which of them they have reached.
    """

    def __init__(self) -> None:
        self._store = KeyValueStore(f"save/{next(_barrier_numbers)}")
        self._meeting_numbers = itertools.count()
        self.has_failed = False
        """Whether a process could not write its part."""

    def __call__(self, key: str, timeout_ms: int) -> None:
        """Wait for all processes.

        Args:
          key: Name of the barrier.
          timeout_ms: Time to wait in milliseconds.

        Raises:
          IncompleteSaveError: If a process is at another barrier, now or at an earlier call.
          TimeoutError: If a process is at no barrier.
        """
        if not self.has_failed:
            number, seconds = str(next(self._meeting_numbers)), timeout_ms / 1000
            count = self._store.meet(number, key, combine=lambda keys: str(len(set(keys))), seconds=seconds)
            self.has_failed = count != "1"
        if self.has_failed:
            raise IncompleteSaveError("another process could not write its part of the checkpoint")


def open_writer(
    folder: CheckpointFolder, preservation_policy: Any, barrier: SaveBarrier | None
) -> ocp.CheckpointManager:
    """Return a manager of all processes that writes, and removes the remains of interrupted saves.

    `barrier` is None for a single process.
    """
    return _make_manager(
        folder,
        preservation_policy=preservation_policy,
        cleanup_tmp_directories=True,
        single_host_load_and_broadcast=jax.process_count() > 1,
        async_options=ocp.options.AsyncOptions(timeout_secs=_SAVE_TIMEOUT, barrier_sync_fn=barrier),
    )


@contextlib.contextmanager
def open_reader(folder: CheckpointFolder) -> Iterator[ocp.CheckpointManager]:
    """Yield a manager with the folder's current contents, of this process alone: it waits for no other."""
    index = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=index, active_processes={index}, barrier_sync_key_prefix=f"reader{index}"
    )
    manager = _make_manager(
        folder, multiprocessing_options=alone, lightweight_initialize=True, enable_async_checkpointing=False
    )
    try:
        yield manager
    finally:
        manager.close()


def _make_manager(folder: CheckpointFolder, **options: Any) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(
        folder,
        options=ocp.CheckpointManagerOptions(create=False, **options),
        item_handlers={"state": ocp.StandardCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()},
    )


def rename_unreadable(folder: CheckpointFolder, steps: Sequence[int]) -> None:
    """Rename checkpoints on a disk to `STEP.unreadable`, or `STEP.unreadable-2` and so on, which Orbax passes over."""
    for step in steps:
        names = itertools.chain([""], (f"-{count}" for count in itertools.count(2)))
        targets = (folder / f"{step}.unreadable{name}" for name in names)
        (folder / str(step)).rename(next(target for target in targets if not target.exists()))


def resolve_folder(folder: str | os.PathLike) -> CheckpointFolder:
    """Return the path of a local folder, or of a URL such as gs://bucket/run that Orbax can write to.

    Raises:
      UserError: If no package for such URLs is installed, or access is denied.
      TransientError: If the storage does not answer.
    """
    if "://" not in str(folder):
        return Path(folder).absolute()
    with convert_storage_errors(str(folder)):
        try:
            place = epath.Path(str(folder))
            place.exists()
        except (ImportError, KeyError, NotImplementedError, ValueError) as error:
            fix = "Install the package for such URLs, such as gcsfs for gs://, or use a local folder."
            raise UserError(f"cannot open {folder} ({format_error(error)}). {fix}") from error
    return place


def create_folder(folder: CheckpointFolder) -> None:
    """Create a folder; all processes of the run call this together.

    An object store has no empty folders. One that holds no more than the remains of an interrupted save would vanish
    while Orbax removes them. Orbax asks in each process whether the folder exists, and processes that got different
    answers would deadlock in different collectives. So the first process writes an empty file into the folder.

    Raises:
      UserError: If access is denied.
      TransientError: If the storage does not answer.
    """
    if isinstance(folder, Path):
        folder.mkdir(parents=True, exist_ok=True)
        return
    marker, is_first = folder / _MARKER, ProcessGroup.get_current().is_first
    action = f"create {folder}"
    result = call_together(action, lambda: retry_transient(lambda: marker.write_bytes(b"")) if is_first else None)
    if result.kind != "none":
        raise_failure(action, result)


@contextlib.contextmanager
def convert_save_errors(step: int, folder: CheckpointFolder) -> Iterator[None]:
    """Turn errors of the disk or the remote storage into user errors. Earlier checkpoints are not affected."""
    try:
        yield
    except UserError:
        raise
    except Exception as raised:  # an OSError, or the orbax or tensorstore error that it was turned into
        # In the process that has failed, the first error is the reason.
        cause = raised.__context__ if isinstance(raised, IncompleteSaveError) else None
        error = cause if isinstance(cause, Exception) else raised
        reason = format_error(error)
        message = f"cannot write the checkpoint of step {step} to {folder} ({reason}). Earlier ones are intact"
        if is_transient(error) or isinstance(error, IncompleteSaveError | TimeoutError):
            advice = "run the same command to resume; if that does not help, check the connection to the storage."
            raise TransientError(f"{message}: {advice}") from error
        is_jax_error = isinstance(error, jax.errors.JaxRuntimeError)  # such as the failure of another process
        if is_jax_error or not (isinstance(error, OSError) or classify_storage_error(error)):
            raise
        advice = "free disk space or grant write permission, then run the same command to resume."
        raise UserError(f"{message}: {advice}") from error


def describe_array(leaf: Any) -> dict[str, Any]:
    """Return the shape and dtype of an array as JSON."""
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}


def make_target(leaf: Any) -> jax.ShapeDtypeStruct:
    """Return the shape, dtype and sharding of an array to be read; without a sharding, on the first device."""
    sharding = getattr(leaf, "sharding", None) or SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def check_arrays(
    folder: Path | epath.Path, stored: Mapping[str, Any], expected: Mapping[str, Any], config_difference: str
) -> None:
    """Raise a user error with the first difference between the arrays of a checkpoint and of the state.

    `config_difference` names the fields of the config that differ, or is empty.
    """
    differences = [f"it lacks {path}" for path in expected if path not in stored]
    differences += [f"it has {path}, which this run does not" for path in stored if path not in expected]
    for path, leaf in expected.items():
        here = describe_array(leaf)
        there = {name: stored[path][name] for name in here} if path in stored else here
        if there != here:
            before, now = ("{dtype}{shape}".format_map(each) for each in (there, here))
            differences.append(f"{path} is {before} there and {now} here")
    if differences:
        count_note = f" (and {len(differences) - 1} more differences)" if len(differences) > 1 else ""
        config_note = f"; config: {config_difference}" if config_difference else ""
        details = f"{differences[0]}{count_note}{config_note}. Use the config of its run, or another folder."
        raise UserError(f"checkpoint {folder} has another config: {details}")
