"""Mapping of our parameters to another project's tensors: a name, and an einops pattern from its layout to ours.

One map of a model serves reading and writing, bit for bit.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import numpy as np
from einops import rearrange

SHARD_BYTES = 5_000_000_000


class TensorMapping(NamedTuple):
    """The name and layout of one of our parameters in another project's files."""

    name: str
    """Name of the tensor; contains `{}` for the layer's number if the parameter stacks layers."""
    pattern: str = ""
    """Einops pattern from their layout to ours, such as `o i -> i o`; empty if the layouts are equal."""
    axis_sizes: tuple[tuple[str, int], ...] = ()
    """Sizes of axes that the pattern splits or joins, if the shapes don't determine them."""
    layers: int | None = None
    """Number of layers along our parameter's first axis, each of which is one of their tensors; None for a single
    tensor."""

    @property
    def names(self) -> list[str]:
        """Return the names of their tensors, in the order of layers."""
        return [self.name] if self.layers is None else [self.name.format(layer) for layer in range(self.layers)]

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        """Return one of their tensors in our layout."""
        return rearrange(array, self.pattern, **dict(self.axis_sizes)) if self.pattern else array

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        """Return our parameter, or one layer of a stack, in their layout; the inverse of `to_ours`."""
        if not self.pattern:
            return array
        theirs, ours = self.pattern.split("->")
        return rearrange(array, f"{ours} -> {theirs}", **dict(self.axis_sizes))


TensorMap = Mapping[str, TensorMapping]
"""Mappings of a model's parameters, by our path."""


def make_dtype_fn(
    dtype: Any, kernel_dtype: Any = None, *, float32_kernels: Collection[str] = ()
) -> Callable[[str], Any]:
    """Return a function from a parameter's path to the dtype that it is cast to.

    If `kernel_dtype` is given, the kernels of linear maps are cast to it, except `float32_kernels`. All other
    parameters are cast to `dtype`. None keeps the file's dtype.
    """

    def get_dtype(path: str) -> Any:
        is_kernel = path.endswith("kernel") and path not in float32_kernels
        return kernel_dtype if kernel_dtype is not None and is_kernel else dtype

    return get_dtype


def get_their_shape(mapping: TensorMapping, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape that their tensor must have for a parameter of ours, or for each layer of a stack."""
    layer_shape = shape if mapping.layers is None else shape[1:]
    return mapping.to_theirs(np.broadcast_to(np.zeros((), np.int8), layer_shape)).shape
