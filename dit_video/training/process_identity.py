"""Identity of a process among those that may write into a folder, on this machine or another."""

import os
import socket
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ProcessIdentity:
    """A process, as others can recognise it and see whether it has ended."""

    host: str
    """Name of its machine, or of its container."""
    pid: int
    """Its number, which another container may use for another process."""
    boot: str
    """Boot of its machine, which is the same in all containers there."""
    namespace: str
    """Namespace of its number, such as that of its container."""
    start_time: str
    """Time of its start in ticks of the machine's clock; empty if the system does not tell."""

    @classmethod
    def get_current(cls) -> "ProcessIdentity":
        """Return the identity of this process."""
        pid = os.getpid()
        try:
            start_time = _read_start_time(pid)
        except OSError:  # not Linux
            start_time = ""
        return cls(socket.gethostname(), pid, _get_boot(), _get_namespace(), start_time)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "ProcessIdentity":
        """Return the identity that `to_json` has described.

        Raises:
          KeyError: If a field is missing.
        """
        texts = [str(value[name]) for name in ("boot", "namespace", "start_time")]
        return cls(str(value["host"]), int(value["pid"]), *texts)

    def to_json(self) -> dict[str, Any]:
        """Return the fields by name."""
        return asdict(self)

    @property
    def is_on_this_machine(self) -> bool:
        """True if the process is on this machine, perhaps in another container."""
        return self.boot == _get_boot()

    @property
    def is_visible(self) -> bool:
        """True if the number of the process means the same here."""
        return self.is_on_this_machine and self.namespace == _get_namespace()

    @property
    def has_ended(self) -> bool:
        """True if the process is known to have ended; False if it runs, is suspended, or cannot be seen from here."""
        if not self.is_visible:
            return False
        if self.start_time:
            try:
                return _read_start_time(self.pid) != self.start_time
            except OSError:  # it has ended, or `/proc` hides the processes of other users
                pass
        return not _exists(self.pid)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def _get_boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # not Linux
        # Machines may have the same name. If none of its network cards tells its number, each process has another one.
        return f"{socket.gethostname()}/{uuid.getnode():012x}"


def _get_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _read_start_time(pid: int) -> str:
    """Return the start of a process in ticks since the boot; "ended" for one that only its parent has not noticed.

    Raises:
      OSError: If there is no such process, or if the system does not tell.
    """
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return "ended" if fields[0] in "ZX" else fields[19]


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
