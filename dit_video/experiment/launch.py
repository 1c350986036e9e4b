"""Start of a run from a script: its processes, its folder, and signals."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jax

from dit_video.core import config_json
from dit_video.core.errors import GracefulStop, TransientError, UserError
from dit_video.core.platform.provenance import get_code_version
from dit_video.core.storage import StoragePathLike, classify_storage_error, to_storage_path
from dit_video.distributed.faults.timeouts import TimeoutConfig
from dit_video.distributed.processes import initialize_distributed
from dit_video.experiment.remote_folder import RemoteFolder, get_local_copy, main_process_first
from dit_video.experiment.run import Experiment, Run
from dit_video.training.folder_lock import lock_folder
from dit_video.training.preemption import raise_on_sigterm


@contextlib.contextmanager
def open_run(
    folder: StoragePathLike,
    experiment: Experiment,
    *,
    timeouts: TimeoutConfig | None = None,
    stopped_code: int = 0,
    profile: tuple[int, int] | None = None,
) -> Iterator[Run]:
    """Connect the processes of a run, lock its folder and create or open the run inside the block.

    The folder of a run at an address (`gs://…`) is fetched to this machine first; what changes in it is sent back, at
    intervals and at the end of the block. The time of the block, and of the process before it, is recorded.

    Args:
      folder: Folder or address of the run.
      experiment: Its config, equal in all processes.
      timeouts: How long other processes are waited for.
      stopped_code: Exit code after SIGTERM or Ctrl-C.
      profile: First and last step that are traced.

    Raises:
      UserError: If processes do not start in time or differ, or if the folder is another run's or in use.
    """
    config = config_json.to_json(experiment)
    with (
        _exit_with(stopped_code),
        raise_on_sigterm(),
        initialize_distributed(config, code=get_code_version(), timeouts=timeouts),
        _exit_with(stopped_code),  # once more, as the processes tell each other their codes
        _convert_disk_errors(folder),
        lock_folder(folder),
        _open_copy(folder) as (local, remote),
    ):
        with main_process_first(remote):
            run = replace(Run.create(local, experiment, remote=remote), profile=profile)
        with run.open_recorder().attempt(from_process_start=True):
            yield run


@contextlib.contextmanager
def _exit_with(code: int) -> Iterator[None]:
    """Give a stop by a signal inside the context the exit code of the script."""
    try:
        yield
    except GracefulStop as stopped:
        stopped.code = code
        raise


@contextlib.contextmanager
def _convert_disk_errors(folder: StoragePathLike) -> Iterator[None]:
    """Give errors of a disk inside the context, such as that of a log, the exit codes of errors of storage."""
    try:
        yield
    except OSError as error:
        problem = None if isinstance(error, BrokenPipeError) else classify_storage_error(error)
        if problem == "transient":
            raise TransientError(
                f"the disk of {folder} does not answer ({error}). Run the same command again."
            ) from error
        if problem in ("space", "access"):
            raise UserError(
                f"the disk of {folder} cannot be written ({error}). Free space, or check the permissions."
            ) from error
        raise


@contextlib.contextmanager
def _open_copy(folder: StoragePathLike) -> Iterator[tuple[Path, RemoteFolder | None]]:
    """Yield the folder that a run works in, and the one at an address that it is a copy of, if any."""
    location = to_storage_path(folder)
    if isinstance(location, Path):
        yield location, None
        return
    local = get_local_copy(location, purpose=f"process-{jax.process_index()}")
    remote = RemoteFolder(location, local)
    if jax.process_index() == 0:  # the others fetch when it is their turn
        remote.fetch()
    with remote.keep_sent():
        yield local, remote
