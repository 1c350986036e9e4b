"""A stack of equal layers, their parameters stacked along a first axis `L`."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import jax
from flax import nnx
from jaxtyping import Array, PyTree

from dit_video.nn.attention.api import RESULTS

Remat = Literal["none", "full", "attention", "dots", "dots_no_batch", "dots_attention", "offload"]
"""What of a layer is kept for the backward pass, the rest being computed again: all of it (`none`: nothing is computed
again), its input alone (`full`), and beside the input

- `attention`: what attention gives. In long rows that is most of the work, and one array of a layer's twenty;
- `dots_no_batch`: the results of matrix products with weights, and `offload`: those, in the host's memory;
- `dots_attention`: both of these, so that no product is computed again but those inside attention's backward pass;
- `dots`: the results of all matrix products, dense attention's scores among them.

Attention is kept where it has a backward pass that computes scores again: `chunked`, `splash` and rings."""
Carried = TypeVar("Carried")
"""what goes from layer to layer: an array, or a tree of arrays"""


def make_stack(make: Callable[[nnx.Rngs], nnx.Module], layers: int, *, rngs: nnx.Rngs) -> nnx.Module:
    """`layers` modules in one, each parameter with a leading axis `L`."""
    return nnx.vmap(make)(rngs.split(layers))


def apply_stack(stack: nnx.Module, x: Carried, *context: PyTree, remat: Remat = "none") -> Carried:
    """`x` through all layers in order: `x = layer(x, *context)`. See `apply_groups`."""
    return apply_groups(x, [Turns(stack, [context])], remat=remat)


class Turns(NamedTuple):
    """A stack, and what its layers are given by their turn in a group; so many of them are in each group."""

    stack: nnx.Module
    contexts: Sequence[tuple[Any, ...]]


def apply_groups(x: Carried, stacks: Sequence[Turns], *, remat: Remat = "none") -> Carried:
    """`x` through groups of layers: in every group, some of the first stack, then some of the second, …

    A layer's turn in the group says what it is given: `x = layer(x, *contexts[turn])`. So layers may differ in what is
    no parameter (patterns of attention that alternate), and kinds of layers may alternate. Every stack has as many
    layers as all groups take.

    GPUs and TPUs run a scan over groups, whose compile time does not grow with depth; on CPU the loop is unrolled,
    which is about 1.5 times faster there. With any `remat` but "none" parts of each layer are computed again in the
    backward pass, in a scan everywhere.
    """
    graphs, grouped = [], []
    for stack, contexts in stacks:
        graph, stacked = nnx.split(stack)
        graphs.append(graph)
        size = len(contexts)
        grouped.append(jax.tree.map(lambda leaf, size=size: leaf.reshape(-1, size, *leaf.shape[1:]), stacked))

    def body(x, group):
        for graph, layers, (_, contexts) in zip(graphs, group, stacks, strict=True):
            for turn, context in enumerate(contexts):
                x = _apply(graph, layers, turn, x, context, remat)
        return x, None

    # Unrolled on CPU, XLA would find the two computations of a layer equal and keep one: no memory would be saved.
    unroll = remat == "none" and jax.default_backend() == "cpu"
    return jax.lax.scan(body, x, grouped, unroll=unroll)[0]


def _apply(
    graph: nnx.GraphDef, layers: PyTree, turn: int, x: Carried, context: tuple[Any, ...], remat: Remat
) -> Carried:
    """`x` through one of a group's layers."""

    def call(layers, x):
        # Taken out of the group in here: what is kept for the backward pass is the group, no copy of a layer.
        layer = jax.tree.map(lambda leaf: leaf[turn], layers)
        return nnx.merge(graph, layer)(x, *context)

    if remat == "none":
        return call(layers, x)
    return jax.checkpoint(call, prevent_cse=False, policy=_policy(remat))(layers, x)


def _policy(remat: Remat) -> Callable[..., Any] | None:
    """What JAX is told to keep; None for nothing but what goes in."""
    policies = jax.checkpoint_policies
    attention = policies.save_only_these_names(RESULTS)
    match remat:
        case "attention":
            return attention
        case "dots_attention":
            return policies.save_from_both_policies(policies.checkpoint_dots_with_no_batch_dims, attention)
        case "dots":
            return policies.checkpoint_dots
        case "dots_no_batch":
            return policies.checkpoint_dots_with_no_batch_dims
        case "offload":
            return policies.offload_dot_with_no_batch_dims("device", "pinned_host")
    return None


def rematerialised(call: Callable[[nnx.Module, Array], Array], layer: nnx.Module, x: Array) -> Array:
    """`call(layer, x)`, computed again in the backward pass, for which `x` and the parameters alone are kept.

    The CPU's compiler finds the two computations equal and keeps the first: there it saves nothing.
    """
    graph, params = nnx.split(layer)
    return jax.checkpoint(lambda params, x: call(nnx.merge(graph, params), x))(params, x)
