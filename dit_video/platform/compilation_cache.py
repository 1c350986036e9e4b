"""Cache of compiled programs: the second start of a script does not compile what the first one did."""

import os
from pathlib import Path
from typing import Any, cast

import jax

MIN_COMPILE_SECONDS = 0.3
"""Shortest compilation that is cached, in seconds; anything faster is compiled again."""


def enable_compilation_cache(folder: Path | None = None) -> Path:
    """Have JAX cache compiled programs in a folder from now on; returns the folder.

    A folder that JAX was given before, for example by `JAX_COMPILATION_CACHE_DIR`, stays. JAX never removes a program;
    the folder may be deleted at any time.

    Args:
      folder: by default `dit_video/programs` in `$XDG_CACHE_HOME`, or in `~/.cache` without that.
    """
    if configured := cast(Any, jax.config).jax_compilation_cache_dir:
        return Path(configured)
    if folder is None:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dit_video" / "programs"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)
    return folder
