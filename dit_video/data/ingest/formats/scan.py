"""All files of a folder and its subfolders, by name."""

import errno
import os
import stat
from pathlib import Path
from typing import NamedTuple

from dit_video.core.errors import UserError
from dit_video.data.ingest.formats.listed import MEDIA, Listed, Rejected, Unusable, check_name


class Scan(NamedTuple):
    """What a folder holds. Nothing is asked of a file but its name until it is used."""

    source: Path
    files: dict[str, os.DirEntry[str]]
    """By path inside the folder, with forward slashes; sorted."""
    rejected: tuple[Rejected, ...] = ()
    """folders that were not entered"""

    @property
    def media(self) -> list[str]:
        return [name for name in self.files if suffix_of(name) in MEDIA]

    def listed(self, name: str, captions: tuple[str, ...] = (), split: str = "train") -> Listed:
        """The clip of that name.

        Raises:
          Unusable: it is not a regular file, or its name is not UTF-8.
        """
        check_name(name)
        entry = self.files[name]
        try:
            status = entry.stat()
        except OSError as error:
            raise Unusable(reason_of(error)) from error
        return Listed(name, captions, size_of(status), str(self.source / name), split=split)


def list_file(name: str, path: str) -> Listed:
    """The clip at `path`, by a name.

    Raises:
      FileNotFoundError: nothing is there.
      Unusable: it is not a regular file, or its name is not UTF-8.
    """
    check_name(name)
    try:
        return Listed(name, (), size_of(os.stat(path)), path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(path) from error
    except OSError as error:
        raise Unusable(reason_of(error)) from error


def suffix_of(name: str) -> str:
    """In lower case, with its dot."""
    return os.path.splitext(name)[1].lower()


def size_of(status: os.stat_result) -> int:
    """Bytes of a regular file.

    Raises:
      Unusable: it is a folder, a pipe, a device.
    """
    if not stat.S_ISREG(status.st_mode):
        raise Unusable("is not a regular file")
    return status.st_size


def reason_of(error: OSError) -> str:
    """Why a file that is there by name cannot be looked at."""
    if error.errno == errno.ENOENT:
        return "is a link to a file that does not exist"
    return f"cannot be read ({error.strerror})"


def scan(source: Path) -> Scan:
    """Read the folder and its subfolders, each once.

    Files and folders whose name begins with a dot are left out. Links are followed; a link to a folder that was read
    already (by its own name, or by a link before it in the order of names) is rejected, so circles end.

    Raises:
      UserError: the folder itself cannot be read.
    """
    files: dict[str, os.DirEntry[str]] = {}
    rejected: list[Rejected] = []
    seen: set[tuple[int, int]] = set()
    links: list[Rejected] = []
    folders = [("", str(source))]
    while folders or links:
        if not folders:
            # Real folders first: what they hold goes by its own name, whatever links to it.
            links.sort(reverse=True)
            folders.append(links.pop())
        prefix, path = folders.pop()
        try:
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in seen:
                rejected.append((prefix.rstrip("/"), "links to a folder that is listed already"))
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(path) as entries:
                found = [entry for entry in entries if not entry.name.startswith(".")]
        except OSError as error:
            if not prefix:
                raise UserError(f"{source} cannot be read ({error.strerror}); make it readable") from error
            rejected.append((prefix.rstrip("/"), reason_of(error)))
            continue
        for entry in found:
            name = prefix + entry.name
            if not _is_folder(entry):
                files[name] = entry
            elif entry.is_symlink():
                links.append((name + "/", entry.path))
            else:
                folders.append((name + "/", entry.path))
    return Scan(source, dict(sorted(files.items())), tuple(sorted(rejected)))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False  # such as a link to itself: a file that cannot be read
