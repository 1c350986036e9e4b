"""FLOPs of the matrix products and convolutions in a program's text, from its instructions (`hlo.Instruction`)."""

import functools
import math
import re
from typing import Any


def count_dot_flops(instruction: Any, computation: Any) -> float:
    """Return the FLOPs of a `dot` instruction, 0 if its operands are unknown."""
    left = computation.get(instruction.operands[0])
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
    if left is None or contracted is None:
        return 0.0
    sizes = left.shapes[0].sizes
    return 2.0 * instruction.shapes[0].values * math.prod(sizes[int(axis)] for axis in contracted[1].split(",") if axis)


def count_gemm_flops(instruction: Any, computation: Any) -> float:
    """Return the FLOPs of a `custom-call` instruction of cuBLAS, to which GPU programs pass matrix products, else 0.

    Its result is the first of several: the others are workspace, and what the epilogue keeps.
    """
    contracted = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.rest)
    left = computation.get(instruction.operands[0]) if instruction.operands else None
    if "__cublas$" not in instruction.rest or left is None or contracted is None:
        return 0.0
    sizes = left.shapes[0].sizes
    axes = [int(axis) for axis in re.findall(r"\d+", contracted[1])]
    return 2.0 * instruction.shapes[0].values * math.prod(sizes[axis] for axis in axes)


def count_convolution_flops(instruction: Any, computation: Any) -> float:
    """Return the FLOPs of a `convolution` instruction, 0 if its operands are unknown.

    TPU programs express matrix products as convolutions, batched ones with the batch as a dilated window.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest)
    left, right = (computation.get(name) for name in instruction.operands[:2])
    if labels is None or left is None or right is None:
        return 0.0
    window = re.search(r"window=\{([^}]*)\}", instruction.rest)
    options = dict(part.split("=") for part in window[1].split()) if window else {}
    spatial = sorted(label for label in labels[1] if label.isdigit())

    def option(name: str, axis: int, default: str) -> str:
        return options[name].split("x")[axis] if name in options else default

    taps = 1
    for axis, label in enumerate(spatial):
        low = int(option("pad", axis, "0_0").split("_")[0])
        taps *= _count_taps(
            left.shapes[0].sizes[labels[1].index(label)],
            right.shapes[0].sizes[labels[2].index(label)],
            instruction.shapes[0].sizes[labels[3].index(label)],
            (low, *(int(option(name, axis, "1")) for name in ("stride", "lhs_dilate", "rhs_dilate"))),
        )
    groups = re.search(r"batch_group_count=(\d+)", instruction.rest)
    batch = instruction.shapes[0].sizes[labels[3].index("b")]
    values = right.shapes[0].sizes
    outputs, inputs = values[labels[2].index("o")], values[labels[2].index("i")]
    return 2.0 * taps * batch * outputs * inputs / (int(groups[1]) if groups else 1)


@functools.lru_cache(maxsize=4096)
def _count_taps(input_size: int, kernel_size: int, output_size: int, window: tuple[int, int, int, int]) -> int:
    """Return the number of products along one spatial axis: pairs of output and weight that read no padding."""
    padding, stride, input_dilation, weight_dilation = window
    last = (input_size - 1) * input_dilation
    total = 0
    for weight in range(kernel_size):
        first = weight * weight_dilation - padding
        if input_dilation == 1:  # The outputs that read an input are contiguous.
            begin, end = max(0, math.ceil(-first / stride)), min(output_size - 1, (last - first) // stride)
            total += max(0, end - begin + 1)
        else:
            indices = range(first, first + output_size * stride, stride)
            total += sum(0 <= index <= last and index % input_dilation == 0 for index in indices)
    return total
