"""Cache of compiled programs: a script's second start does not compile again what the first one compiled."""

import os
import re
import warnings
from pathlib import Path
from typing import Any, cast

import jax

MIN_COMPILE_SECONDS = 0.3
"""Shortest compilation that is cached, in seconds; anything faster is compiled again."""
RUN_FOLDER_NAME = ".programs"
"""Name of the folder of compiled programs in the folder of a run."""

_NETWORK_DISKS = re.compile(
    r"nfs\d?|lustre|gpfs|mmfs|beegfs|ceph|glusterfs|afs|cifs|smb\d?|9p|wekafs|pvfs2|orangefs|daos|virtiofs"
    r"|fuse\.(?!fuse-overlayfs|lxcfs|portal|gvfsd).+"
)
"""Pattern of file system types that several machines may share; object stores are mounted as FUSE types."""


def enable_compilation_cache(
    folder: str | os.PathLike | None = None, *, run_folder: str | os.PathLike | None = None
) -> Path | str:
    """Have JAX cache compiled programs in a folder from now on; returns the folder, or its address.

    A folder that was set before, for example by `JAX_COMPILATION_CACHE_DIR`, stays. JAX never removes a program; the
    folder may be deleted at any time.

    Only the first process of a run writes programs, so the others find them only in a folder that all processes share.
    This may be an address (`gs://…`) if the package for it is installed.

    Args:
      folder: Folder or address; by default, see `choose_cache_folder`.
      run_folder: Folder or address of the run, the same in all of its processes, which must have connected already.
    """
    if configured := cast(Any, jax.config).jax_compilation_cache_dir:
        return configured if "://" in configured else Path(configured)
    if folder is None:
        folder = choose_cache_folder(run_folder, process_count=1 if run_folder is None else jax.process_count())
    if folder is not None and "://" in str(folder) and (problem := _find_problem(str(folder))):
        warnings.warn(f"compiled programs are not kept at {folder} ({problem})", stacklevel=2)
        folder = choose_cache_folder(process_count=1)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)
    return str(folder) if "://" in str(folder) else Path(folder)


def choose_cache_folder(
    run_folder: str | os.PathLike | None = None, *, process_count: int, mounts: str | None = None
) -> Path | str:
    """Return the folder of compiled programs: the user's, which all runs share, or one in the run's folder.

    The user's folder is `dit_video/programs` in `$XDG_CACHE_HOME`, or in `~/.cache` if that is not set. The run's
    folder is chosen for a run at an address, as a later start may be on another machine. It is also chosen for several
    processes, unless the user's folder is on a network disk, where all machines find it.

    Args:
      run_folder: Folder or address of the run; None if there is none.
      process_count: Number of processes of the run.
      mounts: See `is_on_network_disk`.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dit_video" / "programs"
    if run_folder is None:
        return folder
    if "://" in str(run_folder) or (process_count > 1 and not is_on_network_disk(folder, mounts=mounts)):
        return f"{str(run_folder).rstrip('/')}/{RUN_FOLDER_NAME}"
    return folder


def _find_problem(address: str) -> str:
    """Return why JAX could not keep programs at an address; empty if it can."""
    try:
        from etils import epath  # JAX's

        epath.Path(address).exists()
    except Exception as error:  # of the missing package, or of the service's client
        return f"{type(error).__name__}: {error}"
    return ""


def is_on_network_disk(path: str | os.PathLike, *, mounts: str | None = None) -> bool:
    """Return True if a path, which need not exist, is on a disk that other machines may share; False if unknown.

    Args:
      path: The path.
      mounts: Mounted file systems as in `/proc/self/mounts`, which is the default.
    """
    if mounts is None:
        try:
            mounts = Path("/proc/self/mounts").read_text()
        except OSError:  # not Linux
            return False
    parts = Path(os.path.realpath(path)).parts
    best, kind = 0, ""
    for line in mounts.splitlines():
        _, place, this_kind, *_ = line.split(" ")
        place_parts = Path(re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), place)).parts
        if parts[: len(place_parts)] == place_parts and len(place_parts) >= best:
            best, kind = len(place_parts), this_kind
    return _NETWORK_DISKS.fullmatch(kind) is not None
