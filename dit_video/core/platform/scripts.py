"""The start of a script, before its imports."""

import os
import sys
from pathlib import Path
from types import TracebackType

from dit_video.core.platform.xla_flags import set_accelerator_flags

_TUNABLE = "glibc.malloc.hugetlb"
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def use_huge_pages(name: str) -> None:
    """Restart a script, with the same process id, so that its memory is allocated in huge pages; call it first.

    At every call, XLA allocates a program's memory from the C library and frees it, so on CPU every step pays for its
    pages again: 200,000 pages of 4 KB for 0.8 GB. With pages of 2 MB the quickstart's steps take 17 % (denoiser) and 22
    % (autoencoder) less time. glibc (from 2.35 on) requests such pages if `GLIBC_TUNABLES` says so, and reads this
    variable only when a process starts; see "Memory Allocation Tunables" in its manual.

    Nothing happens in an imported module (its `name` is not `__main__`), in a process that has already imported JAX or
    runs a debugger, if `GLIBC_TUNABLES` already holds a choice, on other systems, or if Linux gives such pages to
    nobody or to everybody.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    skipped = name != "__main__" or "jax" in sys.modules or sys.gettrace() is not None
    if skipped or _TUNABLE in tunables or not _is_available():
        return
    os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, (tunables, f"{_TUNABLE}=1")))
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _is_available() -> bool:
    """Return True if Linux gives huge pages on request, and this glibc can request them."""
    try:
        library = os.confstr("CS_GNU_LIBC_VERSION") or ""
        setting = _SETTING.read_text()
    except (AttributeError, ValueError, OSError):
        return False
    version = tuple(int(part) for part in library.removeprefix("glibc ").split(".")[:2] if part.isdigit())
    return version >= (2, 35) and "[madvise]" in setting and bool(sys.executable)


def prepare_script(name: str, *, huge_pages: bool = True) -> None:
    """Prepare the process of a script; call it before the script's other imports, which take seconds.

    A Ctrl-C while they run ends with one line instead of a traceback through them, and GPUs and TPUs get their flags.

    Args:
      name: The script's `__name__`. Nothing happens in an imported module, nor in a process that has imported JAX.
      huge_pages: Restart the script with its memory in huge pages: `use_huge_pages`.
    """
    if name != "__main__" or "jax" in sys.modules:
        return
    sys.excepthook, sys.unraisablehook = _show_exception, _show_unraisable
    set_accelerator_flags()
    if huge_pages:
        use_huge_pages(name)


def _show_exception(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("\ninterrupted during its start: run the same command again", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


def _show_unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    """Show an error that nobody catches, but for those of writes whose event loop is closed.

    Of the writes of a checkpoint, the first one that fails, such as on a full disk, closes the loop, and is told. The
    threads of tensorstore would report all others to the loop.
    """
    error = unraisable.exc_value
    if not (unraisable.object is None and isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
        sys.__unraisablehook__(unraisable)
