"""Lowering of programs for a Hopper GPU, without one."""

import json
import re
from typing import Any

import jax


def pretend_hopper(monkeypatch) -> None:
    """Let JAX lower cuDNN's kernels as on a Hopper GPU, which it would ask for its version and capability."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91500)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda capability: False)


def lower_for_gpus(function, *arguments) -> str:
    """Return the program of a function for GPUs."""
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def list_kernels(program: str) -> dict[str, dict[str, Any]]:
    """Return the settings of cuDNN's kernels in a program, by name."""
    calls = re.findall(r'@(__cudnn\$\w+)\(.*?backend_config = "(.*?)", operand_layouts', program)
    return {name: json.loads(text.replace(r"\22", '"'))["cudnn_fmha_backend_config"] for name, text in calls}
