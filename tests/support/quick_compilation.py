"""XLA flags with which tests compile faster."""

from dit_video.platform.xla_flags import add_flags

_FLAGS = {"xla_cpu_use_fusion_emitters": "false", "xla_cpu_parallel_codegen_split_count": "1"}
"""Flags that halve the time of compilation or more: most of it is the generation of code for fusions through MLIR."""


def set_quick_flags() -> None:
    """Add the flags to the environment, except those that it sets; JAX reads them when it first computes."""
    add_flags("XLA_FLAGS", _FLAGS)
