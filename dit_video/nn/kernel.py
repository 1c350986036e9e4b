"""Kernels that are not plain arrays: the weights of a linear layer in another form, such as quantised or low-rank."""

import abc
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dit_video.core.typing import AnyArray
from dit_video.nn.partitioner import Precision, WeightConstraint

AnySelf = TypeVar("AnySelf", bound="Kernel")  # the checks of types know Self in decorated classes alone


class Kernel(abc.ABC):
    """Weights that a linear layer multiplies by, in place of an array `[i, o]`, or `[L, i, o]` for a stack of layers.

    A subclass is a frozen dataclass whose fields are arrays, each with the leading axis of the stack, under
    `jax.tree_util.register_dataclass`: a scan over the layers then slices it. It takes the place of an array in a
    model's parameters, at a path that ends in `kernel`. Adapters (LoRA) are attached beside it. A subclass after
    `dit_video.core.registry.register` is written to our files and read from them (`dit_video.weights.kernels`).
    """

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the array that it stands for, computed from those of its fields."""

    @property
    @abc.abstractmethod
    def dtype(self) -> np.dtype:
        """Return the dtype of the array that it stands for, in which adapters are kept."""

    @abc.abstractmethod
    def matmul(
        self,
        x: Float[Array, "*batch i"],
        precision: Precision = None,
        weight_constraint: WeightConstraint | None = None,
    ) -> Float[Array, "*batch o"]:
        """Return the product of `x` and the kernel of a single layer, in the dtype of `x`.

        Args:
          x: Inputs of the layer, in the dtype that it computes in.
          precision: Precision of the product; see `nn.Linear`.
          weight_constraint: Constraint on the sharding of an array `[i, o]` in use, on a mesh; it may be left to the
            compiler.
        """

    def __getitem__(self: AnySelf, index: Any) -> AnySelf:
        """Return the kernel itself for `[...]`, as layers read it.

        Raises:
          TypeError: For any other index.
        """
        if index is not Ellipsis:
            raise TypeError(f"parts of a {type(self).__name__} cannot be taken; index it with [...]")
        return self


AnyKernel = Kernel | Float[AnyArray, "i o"]
"""The weights of a linear layer."""


def is_kernel(node: Any) -> bool:
    """Return True for a `Kernel`: `is_leaf` of functions on trees that take it as a whole."""
    return isinstance(node, Kernel)


def multiply(
    x: Float[Array, "*batch i"],
    kernel: AnyKernel,
    precision: Precision = None,
    weight_constraint: WeightConstraint | None = None,
) -> Float[Array, "*batch o"]:
    """Return the product of `x` and a kernel or an array, in the dtype of `x`; arguments are those of `Kernel.matmul`.

    The kernel's gradient has the dtype of `x`, too; `nn.Linear` sums that of a trained array in float32.
    """
    if isinstance(kernel, Kernel):
        return kernel.matmul(x, precision, weight_constraint)
    kernel = jnp.asarray(kernel).astype(x.dtype)
    return jnp.matmul(x, kernel if weight_constraint is None else weight_constraint(kernel), precision=precision)
