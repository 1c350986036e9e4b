"""Version of the running code and the compiler's flags.

They are written into checkpoints, and compared between the processes of a run.
"""

import functools
import hashlib
import platform
import subprocess
from pathlib import Path
from typing import Any

from dit_video.core.platform.xla_flags import get_flags, get_release
from dit_video.core.version import __version__

_PACKAGE = Path(__file__).parents[2]


@functools.cache
def get_code_version() -> dict[str, Any]:
    """Return the versions of the package, Python and JAX, a digest of the package's files, and the git commit, if any.

    The digest tells whether two machines run the same code, even without git or with uncommitted changes. It includes
    XLA's flags, because programs depend on them.
    """
    return {
        "dit_video": __version__,
        "sources": _compute_digest(),
        "commit": _read_commit(),
        "python": platform.python_version(),
        "jax": get_release("jax"),
        "jaxlib": get_release("jaxlib"),
        "flags": get_flags(),
    }


def _compute_digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        digest.update(f"{path.relative_to(_PACKAGE)}\0".encode())
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _read_commit() -> str | None:
    """Return the commit; None if the package is not at the top of a checkout, which may then be another project's."""
    root = _PACKAGE.parent
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "rev-parse", "HEAD"]
        result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
