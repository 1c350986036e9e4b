"""Lowering of programs for a Hopper GPU, without one."""

import json
import re
from typing import Any

import jax

from dit_video.planning.compiled_program import assume_hopper


def lower_for_gpus(function, *arguments) -> str:
    """Return the program of a function for a Hopper GPU."""
    with assume_hopper():
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def list_kernels(program: str) -> dict[str, dict[str, Any]]:
    """Return the settings of cuDNN's kernels in a program, by name."""
    calls = re.findall(r'@(__cudnn\$\w+)\(.*?backend_config = "(.*?)", operand_layouts', program)
    return {name: json.loads(text.replace(r"\22", '"'))["cudnn_fmha_backend_config"] for name, text in calls}
