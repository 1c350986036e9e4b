"""Stacks of equal layers with parameters stacked along a leading axis `L`, and rematerialisation."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import jax
from flax import nnx
from jaxtyping import Array, PyTree

from dit_video.nn.attention.api import CHECKPOINT_NAME
from dit_video.nn.container import ParamRngs

Remat = Literal["none", "full", "attention", "dots", "dots_no_batch", "dots_attention", "offload"]
"""Rematerialisation policy: the values of a layer that are kept for the backward pass instead of being recomputed.

- `none`: all, nothing is recomputed; `full`: the layer's input alone; the others keep the input and
- `attention`: the output of attention. In long rows it is most of the work, and only one array of a layer's twenty;
- `dots_no_batch`: the results of matrix products with weights; `offload`: the same, in host memory;
- `dots_attention`: both of these, so that only products inside attention's backward pass are recomputed;
- `dots`: the results of all matrix products, including the scores of dense attention.

`attention` has an effect for backends whose backward pass recomputes the scores: `chunked`, `splash` and rings."""
Carry = TypeVar("Carry")
"""Type of the value passed from layer to layer: an array, or a tree of arrays."""


def make_stack(make: Callable[[nnx.Rngs], nnx.Module], layers: int, *, rngs: nnx.Rngs) -> nnx.Module:
    """Build `layers` modules as one, each parameter with a leading axis `L`."""
    graphs: list[nnx.GraphDef] = []

    def init_layer(key: Array) -> Any:
        graph, state = nnx.split(make(ParamRngs(key)))
        graphs.append(graph)
        return state

    states = jax.vmap(init_layer)(jax.random.split(rngs.params(), layers))
    return nnx.merge(graphs[0], states)


def apply_stack(stack: nnx.Module, x: Carry, *context: PyTree, remat: Remat = "none") -> Carry:
    """Apply all layers in order: `x = layer(x, *context)`. See `scan_layers`."""
    return scan_layers(x, [LayerGroup(stack, [context])], remat=remat)


class LayerGroup(NamedTuple):
    """A stack of layers, and one tuple of arguments for each of its layers in a group.

    `len(contexts)` is the number of the stack's layers in a group; the i-th of them is called with `contexts[i]`.
    """

    stack: nnx.Module
    contexts: Sequence[tuple[Any, ...]]


def scan_layers(x: Carry, groups: Sequence[LayerGroup], *, remat: Remat = "none") -> Carry:
    """Apply groups of layers, each with some layers of the first stack, then some of the second, and so on.

    The i-th layer of a stack in a group is called as `x = layer(x, *contexts[i])`. So layers can alternate in what is
    not a parameter (attention patterns), and different kinds of layers can alternate. The number of layers in every
    stack must be the number of groups times `len(contexts)`.

    GPUs and TPUs run a scan over the groups, whose compile time does not grow with depth; on CPU the loop is unrolled,
    which is about 1.5 times faster there. With any `remat` other than "none" a scan is used on every platform.
    """
    graphs, grouped = [], []
    for stack, contexts in groups:
        graph, stacked = nnx.split(stack)
        graphs.append(graph)
        size = len(contexts)
        grouped.append(jax.tree.map(lambda leaf, size=size: leaf.reshape(-1, size, *leaf.shape[1:]), stacked))

    def body(x, group):
        for graph, layers, (_, contexts) in zip(graphs, group, groups, strict=True):
            for turn, context in enumerate(contexts):
                x = _apply_layer(graph, layers, turn, x, context, remat)
        return x, None

    # In an unrolled loop XLA on CPU would merge a layer's recomputation with its first computation and save no memory.
    unroll = remat == "none" and jax.default_backend() == "cpu"
    return jax.lax.scan(body, x, grouped, unroll=unroll)[0]


def _apply_layer(
    graph: nnx.GraphDef, layers: PyTree, index: int, x: Carry, context: tuple[Any, ...], remat: Remat
) -> Carry:
    """Apply one of a group's layers."""

    def call(layers, x):
        # Sliced inside, so that the backward pass keeps the group's parameters and not a copy of the layer's.
        layer = jax.tree.map(lambda leaf: leaf[index], layers)
        return nnx.merge(graph, layer)(x, *context)

    if remat == "none":
        return call(layers, x)
    return jax.checkpoint(call, prevent_cse=False, policy=_get_policy(remat))(layers, x)


def _get_policy(remat: Remat) -> Callable[..., Any] | None:
    """Return the JAX checkpoint policy; None keeps the inputs alone."""
    policies = jax.checkpoint_policies
    attention = policies.save_only_these_names(CHECKPOINT_NAME)
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


def rematerialize(call: Callable[[nnx.Module, Array], Array], layer: nnx.Module, x: Array) -> Array:
    """Return `call(layer, x)`, recomputed in the backward pass; only `x` and the parameters are kept for it.

    On CPU it saves nothing: XLA merges the recomputation with the first computation there.
    """
    graph, params = nnx.split(layer)
    return jax.checkpoint(lambda params, x: call(nnx.merge(graph, params), x))(params, x)
