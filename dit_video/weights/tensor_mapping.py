"""Where another project's files keep a parameter: a name, and an einops pattern from its layout to ours.

One map of a model serves both ways, bit for bit.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from einops import rearrange

SHARD_BYTES = 5_000_000_000


class Foreign(NamedTuple):
    """Where a parameter lies in another project's files."""

    name: str
    """for a stack of layers with `{}` in the place of a layer's number"""
    pattern: str = ""
    """an einops pattern from theirs to ours, such as `o i -> i o`; empty where the layouts are the same"""
    sizes: tuple[tuple[str, int], ...] = ()
    """of axes that the pattern splits or joins, where the arrays don't tell"""
    layers: int | None = None
    """how many layers our parameter has along its first axis, each a tensor of theirs; None: it is one tensor"""

    @property
    def names(self) -> list[str]:
        """of their tensors, in order"""
        return [self.name] if self.layers is None else [self.name.format(layer) for layer in range(self.layers)]

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        """One of their tensors in our layout."""
        return rearrange(array, self.pattern, **dict(self.sizes)) if self.pattern else array

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        """The inverse: of a stack, one layer."""
        if not self.pattern:
            return array
        theirs, ours = self.pattern.split("->")
        return rearrange(array, f"{ours} -> {theirs}", **dict(self.sizes))


Names = Mapping[str, Foreign]
"""By our path."""


def stored_as(dtype: Any, kernels: Any = None) -> Callable[[str], Any]:
    """The dtype that a floating parameter is cast to, by its path: `dtype`, but that of linear maps' kernels `kernels`.

    None keeps what the file has; for `kernels` it is as for all others.
    """
    return lambda path: kernels if kernels is not None and path.endswith("kernel") else dtype


def their_shape(foreign: Foreign, shape: tuple[int, ...]) -> tuple[int, ...]:
    """What shape their tensor must have, for a stack each of theirs."""
    one = shape if foreign.layers is None else shape[1:]
    return foreign.to_theirs(np.broadcast_to(np.zeros((), np.int8), one)).shape
