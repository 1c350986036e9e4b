"""Which code runs: written into checkpoints, and compared between the processes of one run."""

import functools
import hashlib
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]


@functools.cache
def code_version() -> dict[str, str | None]:
    """Versions of the package, Python and JAX, a digest of the package's files, and the commit of a git checkout.

    The digest says whether two places run the same code, also where there is no git, or changes are not committed.
    """
    return {
        "dit_video": _installed("dit-video"),
        "sources": _digest(),
        "commit": _commit(),
        "python": platform.python_version(),
        "jax": _installed("jax"),
        "jaxlib": _installed("jaxlib"),
    }


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        digest.update(f"{path.relative_to(_PACKAGE)}\0".encode())
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _commit() -> str | None:
    """None where the package does not lie at the top of a checkout: a folder above may be a repository of others."""
    root = _PACKAGE.parent
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
