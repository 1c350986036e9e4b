"""Age of this process, as the operating system knows it."""

import os
import subprocess
import time
from pathlib import Path

_IMPORT_TIME = time.monotonic()


def get_process_age() -> float:
    """Return the seconds since the start of this process, before its first import.

    A script that has restarted itself (`os.exec…`) counts from its first start. If the operating system does not tell,
    this is the time since the import of this module.
    """
    since_import = time.monotonic() - _IMPORT_TIME
    try:
        age = _read_proc() if Path("/proc/self/stat").exists() else _ask_ps()
    except (OSError, ValueError, IndexError, AttributeError, subprocess.SubprocessError):
        return since_import
    return max(age, since_import)


def _read_proc() -> float:
    """Return the age from Linux: field 22 is the start, in ticks since the machine's start, including suspension."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")


def _ask_ps() -> float:
    """Return the age from `ps`, for example on macOS, which prints `[[days-]hours:]minutes:seconds`."""
    command = ["ps", "-o", "etime=", "-p", str(os.getpid())]
    text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    days, _, clock = text.rpartition("-")
    seconds = 0
    for part in clock.split(":"):
        seconds = 60 * seconds + int(part)
    return float(int(days or 0) * 86400 + seconds)
