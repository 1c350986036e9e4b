"""A stack of equal layers, their parameters stacked along a first axis `L`."""

from collections.abc import Callable
from typing import Literal, TypeVar

import jax
from flax import nnx
from jaxtyping import Array, PyTree

Remat = Literal["none", "full"]
Carried = TypeVar("Carried")
"""what goes from layer to layer: an array, or a tree of arrays"""


def make_stack(make: Callable[[nnx.Rngs], nnx.Module], layers: int, *, rngs: nnx.Rngs) -> nnx.Module:
    """`layers` modules in one, each parameter with a leading axis `L`."""
    return nnx.vmap(make)(rngs.split(layers))


def apply_stack(stack: nnx.Module, x: Carried, *context: PyTree, remat: Remat = "none") -> Carried:
    """`x` through all layers in order: `x = layer(x, *context)`.

    GPUs and TPUs run a scan, whose compile time does not grow with depth; on CPU the loop is unrolled, which is
    about 1.5 times faster there. `remat="full"` recomputes each layer in the backward pass, in a scan everywhere.
    """
    graph, stacked = nnx.split(stack)

    def body(x, layer):
        return nnx.merge(graph, layer)(x, *context), None

    # Unrolled on CPU, XLA would find the two computations of a layer equal and keep one: no memory would be saved.
    unroll = remat == "none" and jax.default_backend() == "cpu"
    if remat == "full":
        body = jax.checkpoint(body, prevent_cse=False)
    return jax.lax.scan(body, x, stacked, unroll=unroll)[0]


def rematerialised(call: Callable[[nnx.Module, Array], Array], layer: nnx.Module, x: Array) -> Array:
    """`call(layer, x)`, computed again in the backward pass, for which `x` and the parameters alone are kept.

    The CPU's compiler finds the two computations equal and keeps the first: there it saves nothing.
    """
    graph, params = nnx.split(layer)
    return jax.checkpoint(lambda params, x: call(nnx.merge(graph, params), x))(params, x)
