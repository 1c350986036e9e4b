"""Ways to lower and compile tiny programs faster than JAX does by itself."""

import itertools
from importlib.metadata import version
from typing import Any

from jax._src.interpreters import mlir

from dit_video.core.platform.xla_flags import add_flags

_FLAGS = {"xla_cpu_parallel_codegen_split_count": "1"} | (
    {"xla_cpu_use_fusion_emitters": "false"} if version("jaxlib").startswith("0.10.") else {}
)
"""Flags that halve the time of compilation or more: most of it is the generation of code for fusions through MLIR.
Newer releases of jaxlib than 0.10 end a process that turns the emitters off, as they do not know the flag."""
OPTIMIZED = {"XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
"""Environment of a process that computes for long, whose programs are optimised as users' are."""
_PROGRAMS_OF_A_CONTEXT = 200
"""Number of programs after which a new context is made, as one keeps the constants of all programs."""


def set_quick_flags() -> None:
    """Add the flags to the environment, except those that it sets; JAX reads them when it first computes."""
    add_flags("XLA_FLAGS", _FLAGS)


def share_contexts() -> None:
    """Lower many programs in one MLIR context, as making one takes a quarter of the time of a tiny program.

    JAX has no public function for that. Without its internal one, each program has a context of its own.
    """
    make_context = getattr(mlir, "make_ir_context", None)
    if make_context is None:
        return
    numbers, contexts = itertools.count(), []

    def get_context() -> Any:
        if next(numbers) % _PROGRAMS_OF_A_CONTEXT == 0:
            contexts[:] = [make_context()]
        return contexts[0]

    mlir.make_ir_context = get_context
