"""Folder of a run at an address (`gs://…`), and the copies of it that processes work in.

Object stores have no symbolic links, no appends and no folders that are renamed. So each process of a run at an address
works in a folder on its own machine. Checkpoints, latents and data sets are written to the address at once, and folders
of the copy stand for them (see `datasets.link_folder`). All other files (config, logs, samples, reports, finished
weights) are sent to the address by the first process, at intervals and after every stage; other processes, and later
starts on any machine, fetch them from there.

`manifest.json` at the address lists the files, and the folders that the copy stands for. It is written after them, so
that files of an interrupted upload are not part of the folder. It holds no address: a run may be copied to another one.
"""

import contextlib
import hashlib
import os
import shutil
import sys
import threading
import warnings
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
from upath import UPath

from dit_video.core.errors import MissingError, UserError
from dit_video.core.files import write_json
from dit_video.core.storage import (
    StoragePathLike,
    convert_storage_errors,
    download,
    get_default_cache,
    read_document,
    to_storage_path,
    upload,
    write_document,
)
from dit_video.distributed import processes
from dit_video.distributed.faults.progress import declare_phase
from dit_video.experiment import datasets
from dit_video.sampling.pipeline_config import WHOLE_FOLDERS
from dit_video.training.folder_lock import check_locks
from dit_video.training.hooks.hook import Hook

MANIFEST = "manifest.json"
FORMAT = 1
_THREADS = 8
"""Number of files that are copied at once."""
_SEND_SECONDS = 30.0
"""Seconds between two uploads of changed files while a run works."""
_FETCH_ATTEMPTS = 3
"""Number of times that a folder is fetched whose files change meanwhile."""
_MAX_LOG_BYTES = 1 << 28
"""Size of the largest file that is read before it is sent, as it may grow. Larger files are weights."""


class _Manifest(NamedTuple):
    """The contents of the folder at the address."""

    files: dict[str, dict[str, Any]]
    """MD5 of each file that the copy has, by its name."""
    linked: list[str]
    """Folders that the copy stands for."""


class _FileState(NamedTuple):
    """A local file as it was when it was last equal to the one at the address."""

    size: int
    mtime_ns: int
    md5: str


class RemoteFolder:
    """A folder at an address and its copy on this machine, which is complete after `fetch`.

    One process at a time sends; the lock of the run's folder makes sure of that.
    """

    def __init__(self, address: StoragePathLike, local: Path) -> None:
        """Name the two folders; neither is read yet.

        Args:
          address: Folder at an address, which need not exist yet.
          local: Folder of the copy.

        Raises:
          UserError: If the scheme of the address is unknown, or the service denies access.
        """
        self.address: Any = to_storage_path(address)
        self.local = local
        self._states: dict[str, _FileState] = {}
        self._lock = threading.Lock()

    def fetch(self) -> None:
        """Make the copy equal to the folder at the address: fetch changed files, and remove those that are not there.

        Raises:
          UserError: If a file cannot be fetched.
        """
        with declare_phase("fetch"):
            for _ in range(_FETCH_ATTEMPTS - 1):
                with contextlib.suppress(MissingError):  # a run that is in progress has just removed a file
                    return self._fetch()
            return self._fetch()

    def _fetch(self) -> None:
        with self._lock:
            listed, linked = self._read_manifest()
            links = {f"{name}/{datasets.ADDRESS_FILE}": str(self.address / name) for name in linked}
            for name in self._list_local() - listed.keys() - links.keys():
                (self.local / name).unlink(missing_ok=True)
            for name, target in links.items():
                if not self._is_link(name):
                    write_json(self.local / name, target)
            changed = [name for name, entry in listed.items() if self._get_md5(name) != entry["md5"]]
            self._for_each(changed, lambda name: download(self.address / name, self.local / name))
            # A file of a later, interrupted upload makes a folder of two times; some are of use only as a whole.
            outdated = {name for name in changed if self._get_md5(name) != listed[name]["md5"]}
            for name in outdated:
                for folder in Path(name).parents:  # of the run, or of a nested one
                    if folder.name in WHOLE_FOLDERS:
                        shutil.rmtree(self.local / folder, ignore_errors=True)
            self._remove_empty_folders()

    def send(self) -> None:
        """Make the folder at the address equal to the copy: send changed files, and remove those that are gone.

        Raises:
          UserError: If a file cannot be sent.
          TransientError: If another run has taken over the folder.
        """
        with self._lock:
            check_locks()
            before = self._read_manifest()
            local = self._list_local()
            linked = sorted(name for name in local if self._is_link(name))
            hashes = {name: entry["md5"] for name, entry in before.files.items()}
            changed = [name for name in sorted(local - set(linked)) if self._get_md5(name) != hashes.get(name)]
            sent = dict(self._for_each(changed, self._send_file))
            files = {name: entry for name, entry in before.files.items() if name in local} | sent
            files = {name: files[name] for name in sorted(files) if files[name] and name not in linked}
            manifest = _Manifest(files, [name.rpartition("/")[0] for name in linked])
            if manifest == before:
                return
            write_document(self.address / MANIFEST, {"format": FORMAT, **manifest._asdict()})
            self._for_each(before.files.keys() - files.keys(), self._remove_remote_file)

    def try_to_send(self) -> None:
        """Send changed files, or warn that they could not be sent yet."""
        try:
            self.send()
        except (UserError, OSError) as error:
            warnings.warn(f"files of the run are not at {self.address} yet: {error}", stacklevel=2)

    @contextlib.contextmanager
    def keep_sent(self, seconds: float = _SEND_SECONDS) -> Iterator[None]:
        """Send changed files at intervals while the context lasts, and at its end; the first process alone does.

        Failures in between are warned of, as the next interval may succeed; one at the end is raised.
        """
        if jax.process_index() != 0:
            yield
            return
        ended = threading.Event()

        def send_at_intervals() -> None:
            while not ended.wait(seconds):
                self.try_to_send()

        thread = threading.Thread(target=send_at_intervals, name="send files of the run", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            with _report_if_failing(), declare_phase("send"):
                self.send()

    def _read_manifest(self) -> _Manifest:
        try:
            document = read_document(self.address / MANIFEST)
        except MissingError:
            return _Manifest({}, [])
        if document.get("format") != FORMAT:
            rule = f"has format {document.get('format')}, but this version reads {FORMAT}"
            raise UserError(f"{self.address / MANIFEST} {rule}. Use the version that wrote it.")
        return _Manifest(document["files"], document["linked"])

    def _is_link(self, name: str) -> bool:
        """Return whether a local file lets its folder stand for one at the address."""
        folder, _, file = name.rpartition("/")
        if file != datasets.ADDRESS_FILE:
            return False
        return str(datasets.resolve(self.local / folder)) == str(self.address / folder)

    def _list_local(self) -> set[str]:
        """Return the names of the complete files of the copy; those that are being written begin with a dot."""
        names = set()
        for folder, folders, files in os.walk(self.local):  # which passes over folders that vanish meanwhile
            folders[:] = [each for each in folders if each[0] != "."]
            paths = (Path(folder, each) for each in files if each[0] != ".")
            names |= {path.relative_to(self.local).as_posix() for path in paths if not path.is_symlink()}
        return names

    def _get_md5(self, name: str) -> str:
        """Return the hash of a local file; empty if there is none. A file is only read if it has changed."""
        try:
            details = (self.local / name).stat()
            state = self._states.get(name)
            if state is None or state[:2] != (details.st_size, details.st_mtime_ns):
                with (self.local / name).open("rb") as file:
                    md5 = hashlib.file_digest(file, "md5").hexdigest()
                state = self._states[name] = _FileState(details.st_size, details.st_mtime_ns, md5)
        except FileNotFoundError:
            return ""
        return state.md5

    def _send_file(self, name: str) -> dict[str, Any]:
        """Send a file, and return its entry of the manifest; an empty one if the run has removed it meanwhile."""
        path, target = self.local / name, self.address / name
        try:
            is_log = path.stat().st_size <= _MAX_LOG_BYTES
            content = path.read_bytes() if is_log else b""  # a log may grow while it is sent
        except FileNotFoundError:
            return {}
        if not is_log:  # weights, which do not change
            try:
                upload(path, target)
            except MissingError:
                if path.exists():
                    raise
                return {}
            return {"md5": self._get_md5(name)}
        with convert_storage_errors(target):
            target.fs.pipe_file(target.path, content)
        return {"md5": hashlib.md5(content).hexdigest()}

    def _remove_remote_file(self, name: str) -> None:
        path: UPath = self.address / name
        with convert_storage_errors(path), contextlib.suppress(FileNotFoundError):
            path.unlink()

    def _for_each(self, names: Collection[str], function: Callable[[str], Any]) -> list[tuple[str, Any]]:
        """Call a function for many files at once, and return the names with its results."""
        if not names:
            return []
        with ThreadPoolExecutor(_THREADS) as threads:
            return list(zip(names, threads.map(function, names), strict=True))

    def _remove_empty_folders(self) -> None:
        folders = sorted((path for path in self.local.rglob("*") if path.is_dir()), reverse=True)
        for folder in folders:
            with contextlib.suppress(OSError):
                folder.rmdir()


@dataclass(frozen=True)
class SendLogs(Hook):
    """Upload of a training's logs before each checkpoint, so that they reach to it wherever the run continues."""

    first_process_only = True
    folder: RemoteFolder

    def before_save(self, step: int, state: Any) -> None:
        self.folder.try_to_send()


@contextlib.contextmanager
def main_process_first(folder: RemoteFolder | None) -> Iterator[None]:
    """Run the block in the first process before the others, which then have the files that it has written.

    Args:
      folder: Folder of the run; None for one that all processes share.
    """
    with processes.main_process_first():
        is_first = jax.process_index() == 0
        if folder is not None and not is_first:
            folder.fetch()
        yield
        if folder is not None and is_first:
            with declare_phase("send"):
                folder.send()


@contextlib.contextmanager
def _report_if_failing() -> Iterator[None]:
    """Print errors of the block instead of raising them while another error is on its way."""
    is_failing = sys.exc_info()[0] is not None
    try:
        yield
    except UserError as error:
        if not is_failing:
            raise
        print(f"error: {error}", file=sys.stderr)


def get_local_copy(address: StoragePathLike, *, purpose: str) -> Path:
    """Return the folder of a copy in this machine's cache, one for each address and purpose."""
    digest = hashlib.sha256(str(address).rstrip("/").encode()).hexdigest()[:16]
    return get_default_cache() / "runs" / digest / purpose
