"""Memory of this process, as Linux reports it in /proc."""

import contextlib
import ctypes
from pathlib import Path

import pyarrow as pa


def read_memory(name: str) -> int:
    """Return a figure of this process in bytes, such as `VmRSS` for now or `VmHWM` for the peak."""
    return 1024 * int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0])


def reset_peak_memory() -> None:
    """Let the peak count from now on."""
    Path("/proc/self/clear_refs").write_text("5")


def release_memory() -> None:
    """Return memory that is not used any more to the system, so that figures of before and after can be compared."""
    pa.default_memory_pool().release_unused()
    with contextlib.suppress(AttributeError):  # a C library without it
        ctypes.CDLL(None).malloc_trim(0)
