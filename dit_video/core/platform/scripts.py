"""The start of a script, before its imports."""

import sys
from types import TracebackType

from dit_video.core.platform.huge_pages import use_huge_pages
from dit_video.core.platform.xla_flags import set_accelerator_flags


def prepare_script(name: str, *, huge_pages: bool = True) -> None:
    """Prepare the process of a script; call it before the script's other imports, which take seconds.

    A Ctrl-C while they run ends with one line instead of a traceback through them, and GPUs and TPUs get their flags.

    Args:
      name: The script's `__name__`. Nothing happens in an imported module, nor in a process that has imported JAX.
      huge_pages: Restart the script with its memory in huge pages: `use_huge_pages`.
    """
    if name != "__main__" or "jax" in sys.modules:
        return
    sys.excepthook = _show_exception
    set_accelerator_flags()
    if huge_pages:
        use_huge_pages(name)


def _show_exception(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("\ninterrupted during its start: run the same command again", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)
