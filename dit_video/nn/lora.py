r"""Low-rank adapters (LoRA, arXiv 2106.09685) as functions on parameter trees.

To a kernel $W$ of a linear map an adapter adds $w\,s\,a\,b$, of rank $r$: $a$ is `[i, r]`, $b$ `[r, o]`, both with the
leading axes of a stack of layers, $s$ is the adapter's own scale ($\alpha / r$) and $w$ how much of it is wanted. An
adapter is a nested dictionary with `{"a": ..., "b": ..., "scale": ...}` where the parameters have a kernel:

- `merge_lora` gives parameters of the same shapes, with the sum in the kernels;
- `attach_lora` gives parameters whose kernels are `LowRank`: $x W + s\,(x a)\,b$ is computed instead, without ever
  making the product or the kernel's gradient. That is how adapters are trained.

Both can be applied again, with another adapter.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dit_video.core.errors import UserError
from dit_video.core.trees import closest, flatten, unflatten
from dit_video.core.typing import AnyArray
from dit_video.nn.linear import Placed

_SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Which kernels are adapted, and by how much room.

    Raises:
      UserError: a rank below 1, an alpha that is not positive, no targets, or one that is no regular expression.
    """

    rank: int = 16
    alpha: float = 16.0
    """The change of a kernel is multiplied by `alpha / rank`."""
    targets: tuple[str, ...] = (r"blocks/.*kernel$",)
    """regular expressions, found anywhere in the paths of the kernels that are adapted"""

    def __post_init__(self):
        if self.rank < 1 or not self.alpha > 0:
            raise UserError(f"LoRA needs a rank from 1 on and a positive alpha; got rank={self.rank}, {self.alpha=}")
        if not self.targets:
            raise UserError(r"LoRA needs the paths of kernels to adapt; give targets such as blocks/.*kernel$")
        for pattern in self.targets:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"{pattern!r} is no regular expression for parameter paths: {error}") from error

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def init_lora(params: Mapping[str, Any], config: LoraConfig, key: Array) -> dict[str, Any]:
    """Fresh factors `{"a", "b"}` at every target; `b` is zero, so that they change nothing yet. Can be traced.

    Args:
      params: the model's parameters, or their shapes.
      config: names the targets.
      key: for `a`, which is uniform with variance 1 / (3 i).

    Raises:
      UserError: a target that no parameter has, or that is not the kernel of a linear map.
    """
    factors: dict[str, Any] = {}
    for number, (path, shape) in enumerate(_targets(params, config).items()):
        *leading, features_in, features_out = shape
        limit = 1 / math.sqrt(features_in)
        of_path = jax.random.fold_in(key, number)
        a = jax.random.uniform(of_path, (*leading, features_in, config.rank), jnp.float32, -limit, limit)
        factors |= {f"{path}/a": a, f"{path}/b": jnp.zeros((*leading, config.rank, features_out), jnp.float32)}
    return unflatten(factors)


def scaled(factors: Mapping[str, Any], scale: float) -> dict[str, Any]:
    """The adapter of factors with one scale everywhere."""
    leaves = flatten(factors)
    stacks = {path[:-2]: leaf.shape[:-2] for path, leaf in leaves.items() if path.endswith("/a")}
    return unflatten(leaves | {f"{path}/scale": np.full(stack, scale) for path, stack in stacks.items()})


def merge_lora(
    params: Mapping[str, Any], lora: Mapping[str, Any], weight: float | Float[AnyArray, ""] = 1.0
) -> dict[str, Any]:
    """Parameters with the adapter's changes in their kernels, which keep their dtype.

    Raises:
      UserError: an adapter of kernels that the model does not have.
    """
    leaves = flatten(params)
    for path, (a, b) in _scaled_factors(leaves, lora, weight).items():
        kernel = leaves[path]
        leaves[path] = (kernel + a @ b).astype(kernel.dtype)
    return _like(params, leaves)


def attach_lora(
    params: Mapping[str, Any], lora: Mapping[str, Any], weight: float | Float[AnyArray, ""] = 1.0
) -> dict[str, Any]:
    """Parameters whose adapted kernels are `LowRank`, for `nn.Linear`.

    Raises:
      UserError: an adapter of kernels that the model does not have.
    """
    leaves = dict(_leaves(params))
    for path, (a, b) in _scaled_factors(leaves, lora, weight).items():
        kernel = leaves[path]
        if isinstance(kernel, LowRank):  # two adapters are one, of both ranks
            a, b = jnp.concatenate([kernel.a, a], axis=-1), jnp.concatenate([kernel.b, b], axis=-2)
            kernel = kernel.kernel
        leaves[path] = LowRank(kernel, a, b)
    return _like(params, leaves)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LowRank:
    """`kernel + a b`, never computed: what a linear map needs of its kernel is `x @ kernel`. A scan slices it."""

    kernel: Any
    a: Any
    b: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.kernel.shape

    def __getitem__(self, index: Any) -> "LowRank":
        if index is not Ellipsis:
            raise TypeError("only the whole of an adapted kernel can be taken; merge the adapter to take parts")
        return self

    def astype(self, dtype: Any) -> "LowRank":
        return LowRank(self.kernel.astype(dtype), self.a.astype(dtype), self.b.astype(dtype))

    def laid(self, placed: Placed) -> "LowRank":
        """With the kernel, of which no gradient is asked, and the factors where `placed` says."""
        return LowRank(placed(self.kernel), *placed.factors(self.a, self.b))

    def __rmatmul__(self, x: Array) -> Array:
        return x @ self.kernel + (x @ self.a) @ self.b


def _targets(params: Mapping[str, Any], config: LoraConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of the kernels that are adapted, by path."""
    shapes = {path: tuple(leaf.shape) for path, leaf in flatten(params).items()}
    for pattern in config.targets:
        if not any(re.search(pattern, path) for path in shapes):
            raise UserError(f"LoRA target {pattern!r} is no parameter's path; close are {closest(pattern, shapes)}")
    found = {path: shape for path, shape in shapes.items() if any(re.search(p, path) for p in config.targets)}
    for path, shape in found.items():
        if path.split("/")[-1] != "kernel" or len(shape) not in (2, 3):
            raise UserError(
                f"LoRA target {path} {list(shape)} is not the kernel of a linear map [i, o], stacked [L, i, o] or not; "
                "give targets that end in kernel$"
            )
    return found


def _scaled_factors(
    leaves: Mapping[str, Any], lora: Mapping[str, Any], weight: float | Float[AnyArray, ""]
) -> dict[str, tuple[Any, Any]]:
    """`a`, with all scales in it, and `b`, by the path of their kernel."""
    given = flatten(lora)
    paths = [path[:-2] for path in given if path.endswith("/a")]
    if unknown := [path for path in paths if path not in leaves]:
        more = f", … {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
        raise UserError(f"the model lacks kernels of the adapter: {', '.join(unknown[:_SHOWN])}{more}")
    factors = {}
    for path in paths:
        a, b = given[f"{path}/a"], given[f"{path}/b"]
        *leading, features_in, features_out = leaves[path].shape
        wanted = ((*leading, features_in, a.shape[-1]), (*leading, a.shape[-1], features_out))
        if (a.shape, b.shape) != wanted:
            raise UserError(
                f"the adapter's factors of {path} are {list(a.shape)} and {list(b.shape)}, its kernel is "
                f"{list(leaves[path].shape)}; use an adapter of this model"
            )
        scale = (weight * given[f"{path}/scale"])[..., None, None]
        factors[path] = ((a * scale).astype(a.dtype), b)
    return factors


def _leaves(params: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """By path; an adapted kernel is one leaf."""
    for name, value in params.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{above}{name}/")
        else:
            yield f"{above}{name}", value


def _like(params: Mapping[str, Any], leaves: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """The leaves in the structure of the parameters, of which a part may have none: a text encoder that is frozen."""
    return {
        name: _like(value, leaves, f"{above}{name}/") if isinstance(value, Mapping) else leaves[f"{above}{name}"]
        for name, value in params.items()
    }
