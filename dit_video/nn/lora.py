r"""Low-rank adapters (LoRA, arXiv 2106.09685) as functions on parameter trees.

An adapter adds $w\,s\,a\,b$, of rank $r$, to the kernel $W$ of a linear layer: $a$ is `[i, r]`, $b$ `[r, o]`, both with
the leading axes of a stack of layers, $s$ is the adapter's own scale ($\alpha / r$) and $w$ a weight that users choose.
An adapter is a nested dictionary with `{"a": ..., "b": ..., "scale": ...}` where the parameters have a kernel:

- `merge_lora` returns parameters of the same shapes, with the sum in the kernels;
- `attach_lora` returns parameters whose kernels are `LowRankKernel`: $x W + s\,(x a)\,b$ is computed instead, without
  ever materialising the product or the kernel's gradient. Adapters are trained this way.

Both can be applied repeatedly, with further adapters.
"""

import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dit_video.core.errors import UserError
from dit_video.core.trees import find_closest, flatten, map_with_path, unflatten
from dit_video.core.typing import AnyArray
from dit_video.nn.parallel import Precision, WeightConstraint

_MAX_LISTED = 10


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Configuration of a low-rank adapter: its rank, its scale and the kernels that it adapts.

    Raises:
      UserError: a rank below 1, an alpha that is not positive, no targets, or an invalid regular expression.
    """

    rank: int = 16
    alpha: float = 16.0
    """Numerator of the scale: the change of a kernel is multiplied by `alpha / rank`."""
    targets: tuple[str, ...] = (r"blocks/.*kernel$",)
    """Regular expressions for the paths of the adapted kernels; they may match anywhere in a path."""

    def __post_init__(self):
        if self.rank < 1 or not self.alpha > 0:
            raise UserError(f"LoRA rank={self.rank}, alpha={self.alpha} is invalid; use rank >= 1 and alpha > 0")
        if not self.targets:
            raise UserError(r"LoRA needs the paths of kernels to adapt; give targets such as blocks/.*kernel$")
        for pattern in self.targets:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(
                    f"LoRA target {pattern!r} is not a valid regular expression: {error}; correct its syntax"
                ) from error

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def init_lora(params: Mapping[str, Any], config: LoraConfig, key: Array) -> dict[str, Any]:
    """Return fresh factors `{"a", "b"}` for every target; `b` is zero, so they change nothing yet. Can be traced.

    Args:
      params: parameters of the model, or their shapes.
      config: configuration that names the targets.
      key: random key for `a`, which is uniform with variance 1 / (3 i).

    Raises:
      UserError: a target that matches no parameter, or one that is not the kernel of a linear layer.
    """
    factors: dict[str, Any] = {}
    for number, (path, shape) in enumerate(_find_targets(params, config).items()):
        *leading, features_in, features_out = shape
        limit = 1 / math.sqrt(features_in)
        path_key = jax.random.fold_in(key, number)
        a = jax.random.uniform(path_key, (*leading, features_in, config.rank), jnp.float32, -limit, limit)
        factors |= {f"{path}/a": a, f"{path}/b": jnp.zeros((*leading, config.rank, features_out), jnp.float32)}
    return unflatten(factors)


def add_lora_scale(factors: Mapping[str, Any], scale: float) -> dict[str, Any]:
    """Return an adapter: the factors, with the same scale for every kernel."""
    leaves = flatten(factors)
    stacks = {path[:-2]: leaf.shape[:-2] for path, leaf in leaves.items() if path.endswith("/a")}
    return unflatten(leaves | {f"{path}/scale": np.full(stack, scale) for path, stack in stacks.items()})


def merge_lora(
    params: Mapping[str, Any], lora: Mapping[str, Any], weight: float | Float[AnyArray, ""] = 1.0
) -> dict[str, Any]:
    """Return parameters with the adapter's changes added to their kernels, which keep their dtype.

    Raises:
      UserError: an adapter for kernels that the model does not have.
    """
    leaves = flatten(params)
    for path, (a, b) in _scale_factors(leaves, lora, weight).items():
        kernel = leaves[path]
        leaves[path] = (kernel + a @ b).astype(kernel.dtype)
    return map_with_path(lambda path, _: leaves[path], params)


def attach_lora(
    params: Mapping[str, Any], lora: Mapping[str, Any], weight: float | Float[AnyArray, ""] = 1.0
) -> dict[str, Any]:
    """Return parameters whose adapted kernels are `LowRankKernel`, for `nn.Linear`.

    Raises:
      UserError: an adapter for kernels that the model does not have.
    """
    leaves = flatten(params, is_leaf=_is_adapted)
    for path, (a, b) in _scale_factors(leaves, lora, weight).items():
        kernel = leaves[path]
        if isinstance(kernel, LowRankKernel):  # two adapters equal one whose rank is the sum of theirs
            a, b = jnp.concatenate([kernel.a, a], axis=-1), jnp.concatenate([kernel.b, b], axis=-2)
            kernel = kernel.kernel
        leaves[path] = LowRankKernel(kernel, a, b)
    return map_with_path(lambda path, _: leaves[path], params, is_leaf=_is_adapted)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LowRankKernel:
    """A kernel `kernel + a b` that is never materialised: linear layers only multiply by it. Scans can slice it."""

    kernel: Any
    a: Any
    b: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.kernel.shape

    def __getitem__(self, index: Any) -> "LowRankKernel":
        if index is not Ellipsis:
            raise TypeError("an adapted kernel can only be indexed with [...]; merge the adapter to read parts of it")
        return self

    def astype(self, dtype: Any) -> "LowRankKernel":
        return LowRankKernel(self.kernel.astype(dtype), self.a.astype(dtype), self.b.astype(dtype))

    def constrain(self, weight_constraint: WeightConstraint) -> "LowRankKernel":
        """Return it with a sharding constraint on the kernel, which is frozen, and on the factors."""
        return LowRankKernel(weight_constraint(self.kernel), *weight_constraint.constrain_factors(self.a, self.b))

    def multiply(self, x: Array, precision: Precision = None) -> Array:
        """Return `x @ (kernel + a b)`, with products of a precision; see `nn.Linear`."""
        matmul = functools.partial(jnp.matmul, precision=precision)
        return matmul(x, self.kernel) + matmul(matmul(x, self.a), self.b)


def _find_targets(params: Mapping[str, Any], config: LoraConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the adapted kernels by path."""
    shapes = {path: tuple(leaf.shape) for path, leaf in flatten(params).items()}
    for pattern in config.targets:
        if not any(re.search(pattern, path) for path in shapes):
            closest = find_closest(pattern, shapes)
            raise UserError(f"LoRA target {pattern!r} matches no parameter path; the closest are {closest}")
    targets = {path: shape for path, shape in shapes.items() if any(re.search(p, path) for p in config.targets)}
    for path, shape in targets.items():
        if path.split("/")[-1] != "kernel" or len(shape) not in (2, 3):
            raise UserError(f"LoRA target {path} {list(shape)} is not a linear kernel; use targets that end in kernel$")
    return targets


def _scale_factors(
    leaves: Mapping[str, Any], lora: Mapping[str, Any], weight: float | Float[AnyArray, ""]
) -> dict[str, tuple[Any, Any]]:
    """Return `a`, multiplied by all scales, and `b`, by the path of their kernel."""
    lora_leaves = flatten(lora)
    paths = [path[:-2] for path in lora_leaves if path.endswith("/a")]
    if unknown := [path for path in paths if path not in leaves]:
        more = f", … {len(unknown) - _MAX_LISTED} more" if len(unknown) > _MAX_LISTED else ""
        names = ", ".join(unknown[:_MAX_LISTED])
        raise UserError(f"the adapter does not fit the model, which has no kernel {names}{more}; use one of this model")
    factors = {}
    for path in paths:
        a, b = lora_leaves[f"{path}/a"], lora_leaves[f"{path}/b"]
        *leading, features_in, features_out = leaves[path].shape
        expected = ((*leading, features_in, a.shape[-1]), (*leading, a.shape[-1], features_out))
        if (a.shape, b.shape) != expected:
            raise UserError(
                f"the adapter's factors for {path} have shapes {list(a.shape)} and {list(b.shape)}, which do not fit "
                f"its kernel of shape {list(leaves[path].shape)}; use an adapter of this model"
            )
        scale = (weight * lora_leaves[f"{path}/scale"])[..., None, None]
        factors[path] = ((a * scale).astype(a.dtype), b)
    return factors


def _is_adapted(node: Any) -> bool:
    return isinstance(node, LowRankKernel)
