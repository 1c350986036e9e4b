"""Orbax as checkpoints use it: its managers, one for writing and one for each read, and its errors."""

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import jax
import orbax.checkpoint as ocp
from etils import epath

from dit_video.core.errors import TransientError, UserError
from dit_video.core.storage_errors import classify_storage_error, is_transient
from dit_video.training.agreement import format_error

_SAVE_TIMEOUT = 3600
"""Seconds for all processes to write a checkpoint. One that fails leaves the run, which is noticed sooner."""
_ORBAX_FOLDER = os.path.dirname(ocp.__file__)

# Orbax reports each of its steps to the logger it shares with other packages, so its records are dropped by origin.
logging.getLogger("absl").addFilter(
    lambda record: record.levelno >= logging.WARNING or not record.pathname.startswith(_ORBAX_FOLDER)
)


def open_writer(folder: Path, preservation_policy: Any) -> ocp.CheckpointManager:
    """Return a manager of all processes that writes, and removes the remains of interrupted saves."""
    return _make_manager(
        folder,
        preservation_policy=preservation_policy,
        cleanup_tmp_directories=True,
        single_host_load_and_broadcast=jax.process_count() > 1,
        async_options=ocp.options.AsyncOptions(timeout_secs=_SAVE_TIMEOUT),
    )


@contextlib.contextmanager
def open_reader(folder: Path) -> Iterator[ocp.CheckpointManager]:
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


def _make_manager(folder: Path, **options: Any) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(
        folder,
        options=ocp.CheckpointManagerOptions(create=False, **options),
        item_handlers={"state": ocp.StandardCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()},
    )


def resolve_folder(folder: str | os.PathLike) -> Path:
    """Return the path of a local folder, or of a URL such as gs://bucket/run that Orbax can write to.

    Raises:
      UserError: No package for such URLs is installed, or access is denied.
      TransientError: The storage does not answer.
    """
    if "://" not in str(folder):
        return Path(folder).absolute()
    try:
        place = epath.Path(str(folder))
        place.exists()
    except (ImportError, KeyError, NotImplementedError, ValueError) as error:
        fix = "Install the package for such URLs, such as gcsfs for gs://, or use a local folder."
        raise UserError(f"cannot open {folder} ({format_error(error)}). {fix}") from error
    except Exception as error:  # of the client, by its own types
        advice = "Run the same command again" if is_transient(error) else "Check the address and the credentials"
        kind = TransientError if is_transient(error) else UserError
        raise kind(f"cannot open {folder} ({format_error(error)}). {advice}.") from error
    return cast(Path, place)


@contextlib.contextmanager
def convert_save_errors(step: int, folder: Path) -> Iterator[None]:
    """Turn errors of the disk or the remote storage into user errors. Earlier checkpoints are not affected."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # an OSError, or the orbax or tensorstore error that it was turned into
        message = (
            f"cannot write the checkpoint of step {step} to {folder} ({format_error(error)}). Earlier ones are intact"
        )
        # Orbax turns the wait for another process, which has failed, into a timeout.
        if is_transient(error) or isinstance(error, TimeoutError):
            advice = "run the same command to resume; if that does not help, check the connection to the storage."
            raise TransientError(f"{message}: {advice}") from error
        is_jax_error = isinstance(error, jax.errors.JaxRuntimeError)  # such as the failure of another process
        if is_jax_error or not (isinstance(error, OSError) or classify_storage_error(error)):
            raise
        advice = "free disk space or grant write permission, then run the same command to resume."
        raise UserError(f"{message}: {advice}") from error
