"""Stacks of equal layers with parameters stacked along a leading axis `L`, and rematerialisation."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, PyTree

from dit_video.core.errors import UserError
from dit_video.nn.attention.api import CHECKPOINT_NAME
from dit_video.nn.container import ParamRngs

Remat = Literal["none", "full", "attention", "dots", "dots_no_batch", "dots_attention", "offload"]
"""Rematerialisation policy: the values of a layer that are kept for the backward pass rather than recomputed.

- `none`: all values; `full`: the layer's input alone; the other policies keep the input and
- `attention`: the output of attention, which in long rows is most of the work but only one of a layer's twenty arrays;
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
    return scan_layers(x, [LayerGroup(stack, [context])], remat=remat)[0]


LayerWrapper = Callable[..., tuple[Any, Any]]
"""A function `(layer, x, *context, values) -> (x, output)` that calls a layer with the layer's own values."""


class LayerGroup(NamedTuple):
    """A stack of layers, and a tuple of arguments for each of its layers in a group.

    A group has `len(contexts)` of the stack's layers; the i-th of them is called with `contexts[i]`.
    """

    stack: nnx.Module
    contexts: Sequence[tuple[Any, ...]]
    wrapper: LayerWrapper | None = None
    """Function that calls each layer: the same layers then serve residuals, caches, skipping and token routing."""
    values: PyTree = None
    """Values of each layer for the wrapper, with a leading axis `L`."""


def scan_layers(
    x: Carry, groups: Sequence[LayerGroup], *, layers: slice = slice(None), remat: Remat = "none"
) -> tuple[Carry, list[Any]]:
    """Apply groups of layers, each with some layers of the first stack, then some of the second, and so on.

    The i-th layer of a stack in a group is called as `x = layer(x, *contexts[i])`. Layers can thus alternate in what is
    not a parameter (attention patterns), and different kinds of layers can alternate. Every stack must have the number
    of groups times `len(contexts)` layers.

    Layers in host memory are copied to the devices one group at a time (see `core.offload`).

    GPUs and TPUs run a scan over the groups, whose compile time does not grow with depth; on CPU the loop is unrolled,
    which is about 1.5 times faster there. With any `remat` other than "none" a scan is used on every platform.

    Args:
      x: Input of the first layer.
      groups: The stacks, and the arguments of their layers.
      layers: Range of the first stack's layers that are applied, and that its wrapper has values of. Layers of other
        stacks are applied where they follow a group's last layer.
      remat: Rematerialisation policy.

    Returns:
      The last `x`, and each stack's outputs of its wrapper, with a leading axis `L`.

    Raises:
      UserError: If the range has a step.
    """
    first, size = groups[0], len(groups[0].contexts)
    total = jax.tree.leaves(nnx.state(first.stack))[0].shape[0]
    start, stop, step = layers.indices(total)
    if step != 1:
        raise UserError(f"layers={layers} is invalid: layers follow one another. Use a range without a step.")
    if (start, stop) == (0, total):
        return _scan_groups(x, groups, remat)
    # Whole groups are scanned together; the parts of a group before and after them by themselves.
    cuts = {start, min(-(-start // size) * size, stop), max(stop // size * size, start), max(start, stop)}
    outputs: list[list[Any]] = [[] for _ in groups]
    for begin, end in itertools.pairwise(sorted(cuts)):
        contexts = first.contexts[begin % size :][: end - begin]
        values = _take_layers(first.values, begin - start, end - start)
        part = [LayerGroup(_take_layers(first.stack, begin, end), contexts, first.wrapper, values)]
        for other in groups[1:] if end % size == 0 else ():
            count = len(other.contexts)
            part.append(other._replace(stack=_take_layers(other.stack, begin // size * count, end // size * count)))
        x, results = _scan_groups(x, part, remat)
        for collected, result in zip(outputs, results, strict=False):
            collected.append(result)
    return x, [jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *each) if each else None for each in outputs]


def _take_layers(stacked: Any, start: int, stop: int) -> Any:
    """Return a range of the layers of a stack, or of values with a leading axis of layers."""
    return jax.tree.map(lambda leaf: leaf[start:stop], stacked)


def _scan_groups(x: Carry, groups: Sequence[LayerGroup], remat: Remat) -> tuple[Carry, list[Any]]:
    """Apply groups of layers of which each stack has as many as it has contexts, or a multiple."""
    graphs, grouped = [], []
    for stack, contexts, _, values in groups:
        graph, stacked = nnx.split(stack)
        graphs.append(graph)
        grouped.append(jax.tree.map(functools.partial(_group, size=len(contexts)), (stacked, values)))

    def body(x, members):
        outputs = []
        for graph, layers, group in zip(graphs, members, groups, strict=True):
            layers = jax.tree.map(functools.partial(_take_group, size=len(group.contexts)), layers)
            calls = []
            for turn in range(len(group.contexts)):
                x, output = _apply_layer(graph, layers, turn, x, group, remat)
                calls.append(output)
            outputs.append(jax.tree.map(lambda *leaves: jnp.stack(leaves), *calls))
        return x, outputs

    # In an unrolled loop, XLA on CPU would merge a layer's recomputation with its first computation and save no memory.
    unroll = remat == "none" and jax.default_backend() == "cpu"
    x, outputs = jax.lax.scan(body, x, grouped, unroll=unroll)
    return x, jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), outputs)


def _group(stacked: Any, *, size: int) -> Any:
    """Return layers in groups along a second axis; groups of one layer get that axis only on the devices.

    The reason is that XLA for TPUs cannot reshape every array in host memory.
    """
    return stacked if size == 1 else stacked.reshape(-1, size, *stacked.shape[1:])


def _take_group(group: Array, *, size: int) -> Array:
    """Return the layers of one group on the devices, with a leading axis; those in host memory are copied."""
    if jax.typeof(group).memory_space == jax.memory.Space.Host:
        group = jax.device_put(group, jax.memory.Space.Device)
    return group[None] if size == 1 else group


def _apply_layer(
    graph: nnx.GraphDef, layers: PyTree, turn: int, x: Carry, group: LayerGroup, remat: Remat
) -> tuple[Carry, Any]:
    """Apply one of a group's layers, through its wrapper if there is one."""

    def call(layers, x):
        # The slice is taken here so that the backward pass keeps the group's parameters, not a copy of the layer's.
        params, values = jax.tree.map(lambda leaf: leaf[turn], layers)
        layer, context = nnx.merge(graph, params), group.contexts[turn]
        return (layer(x, *context), None) if group.wrapper is None else group.wrapper(layer, x, *context, values)

    if remat == "none":
        return call(layers, x)
    return jax.checkpoint(call, prevent_cse=False, policy=_get_policy(remat))(layers, x)


def _get_policy(remat: Remat) -> Callable[..., Any] | None:
    """Return the JAX checkpoint policy; None keeps the inputs alone."""
    policies = jax.checkpoint_policies
    attention = policies.save_only_these_names(CHECKPOINT_NAME)
    return {
        "attention": attention,
        "dots_attention": policies.save_from_both_policies(policies.checkpoint_dots_with_no_batch_dims, attention),
        "dots": policies.checkpoint_dots,
        "dots_no_batch": policies.checkpoint_dots_with_no_batch_dims,
        "offload": policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
    }.get(remat)


def rematerialize(call: Callable[[nnx.Module, Array], Array], layer: nnx.Module, x: Array) -> Array:
    """Return `call(layer, x)`, recomputed in the backward pass; only `x` and the parameters are kept for it.

    On CPU this saves nothing, because XLA merges the recomputation with the first computation.
    """
    graph, params = nnx.split(layer)
    return jax.checkpoint(lambda params, x: call(nnx.merge(graph, params), x))(params, x)
