r"""Low-rank adapters (LoRA, arXiv 2106.09685) as functions on parameter trees.

An adapter adds $w\,s\,a\,b$, of rank $r$, to the kernel $W$ of a linear layer: $a$ is `[i, r]`, $b$ `[r, o]`, both with
the leading axes of a stack of layers, $s$ is the adapter's own scale ($\alpha / r$), and $w$ is a weight that users
choose. It may also add $w\,d$ to any parameter, where $d$ is a full difference of the parameter's shape, such as a
bias's. An adapter is a nested dictionary. It has `{"a": ..., "b": ..., "scale": ...}` in place of a kernel, and
`{"diff": ...}` in place of a parameter that it changes as a whole:

- `merge_lora` returns parameters of the same shapes, with the sums in them; `merge_lora_in_place` reuses their memory;
- `attach_lora` returns parameters whose kernels are `LowRankKernel`: $x W + w\,s\,(x a)\,b$ is computed instead,
  without ever materialising the product or the kernel's gradient. Adapters are trained this way. The weight is an
  array, so that a program is compiled once for all weights. Full differences are added.

All of these functions can be applied repeatedly, with further adapters.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dit_video.core.errors import UserError
from dit_video.core.trees import check_path_patterns, check_patterns, flatten, map_with_path, unflatten
from dit_video.core.typing import AnyArray
from dit_video.nn.kernel import Kernel, is_kernel, multiply
from dit_video.nn.partitioner import Precision, WeightConstraint

_MAX_LISTED = 10


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Configuration of a low-rank adapter: its rank, its scale and the kernels that it adapts.

    Raises:
      UserError: If the rank is below 1, alpha is not positive and finite, or there are no targets, or they are a string
        or not regular expressions.
    """

    rank: int = 16
    alpha: float = 16.0
    """Numerator of the scale: the change of a kernel is multiplied by `alpha / rank`."""
    targets: tuple[str, ...] = (r"blocks/.*kernel$",)
    """Regular expressions for the paths of the adapted kernels; they may match anywhere in a path."""

    def __post_init__(self):
        if self.rank < 1 or not 0 < self.alpha < math.inf:
            raise UserError(f"LoRA rank={self.rank}, alpha={self.alpha} is invalid; use rank >= 1 and finite alpha > 0")
        if not self.targets:
            raise UserError(r"LoRA needs the paths of kernels to adapt; give targets such as blocks/.*kernel$")
        check_patterns(targets=self.targets)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def init_lora(params: Mapping[str, Any], config: LoraConfig, key: Array) -> dict[str, Any]:
    """Return fresh factors `{"a", "b"}` for every target; `b` is zero, so they change nothing yet. Can be traced.

    Args:
      params: Parameters of the model, or their shapes.
      config: Configuration that names the targets.
      key: Random key for `a`, which is uniform with variance 1 / (3 i).

    Raises:
      UserError: If a target matches no parameter, or a parameter that is not the kernel of a linear layer.
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
    """Return parameters with the adapter's changes added; they keep their dtype.

    Raises:
      UserError: If the adapter is for parameters that the model lacks, or for other shapes, or changes a `Kernel`.
    """
    leaves = flatten(params, is_leaf=is_kernel)
    for path, change in get_mergeable_changes(params, lora, weight).items():
        add = _add_on_devices if isinstance(leaves[path], jax.Array) else _add_change
        leaves[path] = add(leaves[path], change)
    return map_with_path(lambda path, _: leaves[path], params, is_leaf=is_kernel)


def merge_lora_in_place(
    params: Mapping[str, Any], lora: Mapping[str, Any], weight: float | Float[AnyArray, ""] = 1.0
) -> dict[str, Any]:
    """Return what `merge_lora` returns, in the parameters' own memory: changed arrays on devices are deleted.

    Parameters change one after another, and stacks layer by layer. They keep their sharding, so devices hold little
    more than before. Arrays on the host stay as they are.

    Raises:
      UserError: If the adapter is for parameters that the model lacks, or for other shapes, or changes a `Kernel`; then
        nothing changes.
    """
    leaves = flatten(params, is_leaf=is_kernel)
    for path, change in get_mergeable_changes(params, lora, weight).items():
        leaf = leaves[path]
        add = _make_add_in_place(leaf.sharding) if isinstance(leaf, jax.Array) else _add_change
        leaves[path] = add(leaf, change)
    return map_with_path(lambda path, _: leaves[path], params, is_leaf=is_kernel)


def attach_lora(
    params: Mapping[str, Any], lora: Mapping[str, Any], weight: float | Float[AnyArray, ""] = 1.0
) -> dict[str, Any]:
    """Return parameters whose adapted kernels are `LowRankKernel`, for `nn.Linear`; differences are added.

    Raises:
      UserError: If the adapter is for parameters that the model lacks, or for other shapes, or has a difference of a
        `Kernel`.
    """
    leaves = flatten(params, is_leaf=is_kernel)
    for path, change in get_lora_changes(params, lora, weight).items():
        leaf = leaves[path]
        kernel, factors = (leaf.kernel, leaf.factors) if isinstance(leaf, LowRankKernel) else (leaf, ())
        if change.diff is not None:
            _check_is_array(path, kernel, "Use an adapter that has factors alone")
            kernel = _add_change(kernel, change._replace(factors=None))
        if change.factors is not None:
            factors = (*factors, change.factors)
        leaves[path] = LowRankKernel(kernel, factors) if factors else kernel
    return map_with_path(lambda path, _: leaves[path], params, is_leaf=is_kernel)


class LowRankFactors(NamedTuple):
    """The factors of an adapter for one kernel, `scale * a b`."""

    a: Any
    """First factor, `[i, r]`, or `[L, i, r]` for a stack."""
    b: Any
    """Second factor, `[r, o]`, or `[L, r, o]` for a stack."""
    scale: Any
    """Product of the adapter's own scale and its weight, `[]`, or `[L]` for a stack."""


class LoraChange(NamedTuple):
    """An adapter's change of one parameter."""

    factors: LowRankFactors | None = None
    """Factors whose product is added to a kernel."""
    diff: Any = None
    """Full difference, of the parameter's shape."""
    weight: Any = 1.0
    """Weight of the full difference."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LowRankKernel(Kernel):
    """A kernel plus products of factors. The sum is never materialised: linear layers only multiply by it."""

    kernel: Any
    """The kernel that is adapted, an array or a `Kernel`."""
    factors: tuple[LowRankFactors, ...]
    """Factors of each adapter."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.kernel.shape

    @property
    def dtype(self) -> np.dtype:
        return self.kernel.dtype

    def matmul(
        self,
        x: Float[Array, "*batch i"],
        precision: Precision = None,
        weight_constraint: WeightConstraint | None = None,
    ) -> Float[Array, "*batch o"]:
        """Return the product of `x` and the sum; scales keep their precision."""
        matmul = functools.partial(jnp.matmul, precision=precision)
        y = multiply(x, self.kernel, precision, weight_constraint)
        for a, b, scale in self.factors:
            a, b = a.astype(x.dtype), b.astype(x.dtype)
            a, b = (a, b) if weight_constraint is None else weight_constraint.constrain_factors(a, b)
            y = y + matmul((matmul(x, a) * scale).astype(x.dtype), b)
        return y


def get_lora_changes(
    params: Mapping[str, Any], lora: Mapping[str, Any], weight: float | Float[AnyArray, ""] = 1.0
) -> dict[str, LoraChange]:
    """Return an adapter's changes by parameter path.

    Raises:
      UserError: If the adapter is for parameters that the model lacks, or for other shapes.
    """
    shapes = _get_shapes(params)
    leaves = flatten(lora)
    paths = dict.fromkeys(path.rsplit("/", 1)[0] for path in leaves)
    if unknown := [path for path in paths if path not in shapes]:
        more = f", … {len(unknown) - _MAX_LISTED} more" if len(unknown) > _MAX_LISTED else ""
        names = ", ".join(unknown[:_MAX_LISTED])
        raise UserError(f"the adapter does not fit the model, which has no {names}{more}; use one of this model")
    return {path: _get_change(path, shapes[path], leaves, weight) for path in paths}


def get_mergeable_changes(
    params: Mapping[str, Any], lora: Mapping[str, Any], weight: float | Float[AnyArray, ""] = 1.0
) -> dict[str, LoraChange]:
    """Return an adapter's changes by parameter path, to be added to arrays.

    Raises:
      UserError: If the adapter is for parameters that the model lacks, or for other shapes, or changes a `Kernel`.
    """
    changes, leaves = get_lora_changes(params, lora, weight), flatten(params, is_leaf=is_kernel)
    for path in changes:
        _check_is_array(path, leaves[path], "Attach it (load_lora with merge=False), or merge it before")
    return changes


def _check_is_array(path: str, kernel: Any, fix: str) -> None:
    if isinstance(kernel, Kernel):
        rule = f"{path} is a {type(kernel).__name__}, not an array that it could be added to"
        raise UserError(f"the adapter cannot be merged: {rule}. {fix}")


def _get_shapes(params: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {path: tuple(leaf.shape) for path, leaf in flatten(params, is_leaf=is_kernel).items()}


def _find_targets(params: Mapping[str, Any], config: LoraConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the adapted kernels by path."""
    shapes = _get_shapes(params)
    check_path_patterns("targets", config.targets, shapes)
    targets = {path: shape for path, shape in shapes.items() if any(re.search(p, path) for p in config.targets)}
    for path, shape in targets.items():
        if path.split("/")[-1] != "kernel" or len(shape) not in (2, 3):
            raise UserError(f"LoRA target {path} {list(shape)} is not a linear kernel; use targets that end in kernel$")
    return targets


def _get_change(
    path: str, shape: tuple[int, ...], leaves: Mapping[str, Any], weight: float | Float[AnyArray, ""]
) -> LoraChange:
    """Return the change of a parameter of this shape, from the adapter's leaves."""
    diff, factors = leaves.get(f"{path}/diff"), None
    actual: list[tuple[int, ...]] = [] if diff is None else [tuple(diff.shape)]
    expected = [] if diff is None else [shape]
    if f"{path}/a" in leaves:
        a, b = leaves[f"{path}/a"], leaves[f"{path}/b"]
        *leading, features_in, features_out = shape
        actual += [tuple(a.shape), tuple(b.shape)]
        expected += [(*leading, features_in, a.shape[-1]), (*leading, a.shape[-1], features_out)]
        scale = weight * leaves[f"{path}/scale"]
        factors = LowRankFactors(a, b, (jnp if isinstance(scale, jax.Array) else np).asarray(scale, np.float32))
    if actual != expected:
        shapes = " and ".join(str(list(each)) for each in actual)
        raise UserError(
            f"the adapter's arrays for {path} have shapes {shapes}, which do not fit its shape {list(shape)}; use an "
            "adapter of this model"
        )
    return LoraChange(factors, diff, weight)


def _add_change(leaf: Any, change: LoraChange) -> Any:
    """Return a parameter with a change added, in its dtype; on the host and under tracing, layer by layer."""
    dtype = leaf.dtype
    if change.diff is not None:
        leaf = (leaf + change.weight * change.diff).astype(dtype)
    if change.factors is None:
        return leaf
    a, b, scale = change.factors
    if all(isinstance(each, np.ndarray) for each in (leaf, a, b)):
        result = np.array(leaf)
        for layer in np.ndindex(leaf.shape[:-2]):  # one after the other, as a product takes more memory than a kernel
            result[layer] = (leaf[layer] + (a[layer] * scale[layer]) @ b[layer]).astype(dtype)
        return result
    matmul = functools.partial(jnp.matmul, precision="highest")
    if not isinstance(leaf, jax.core.Tracer) or leaf.ndim != 3:
        return (leaf + matmul(a * scale[..., None, None], b)).astype(dtype)

    def add_layer(layer: Any, stack: Any) -> Any:
        changed = (stack[layer] + matmul(a[layer] * scale[layer], b[layer])).astype(dtype)
        return jax.lax.dynamic_update_index_in_dim(stack, changed, layer, axis=0)

    return jax.lax.fori_loop(0, leaf.shape[0], add_layer, leaf)


_add_on_devices = jax.jit(_add_change)


@functools.lru_cache(maxsize=64)
def _make_add_in_place(sharding: jax.sharding.Sharding) -> Callable[[Any, LoraChange], Any]:
    """Return a function that adds a change to an array on devices, in the array's own memory."""
    return jax.jit(_add_change, donate_argnums=0, out_shardings=sharding)
