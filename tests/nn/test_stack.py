import itertools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dit_video.core.errors import UserError
from dit_video.nn import LayerGroup, Linear, Remat, apply_stack, get_graph_def, init_params, make_stack, scan_layers
from support.jaxprs import count_primitive

WIDTH, LAYERS = 8, 3


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.up, self.down = Linear(WIDTH, 32, rngs=rngs), Linear(32, WIDTH, rngs=rngs)

    def __call__(self, x, shift, context):
        return x + self.down(jnp.tanh(self.up(x + shift))) * context["scale"]


def make(rngs):
    return make_stack(Layer, LAYERS, rngs=rngs)


GRAPH = get_graph_def(make)
PARAMS = jax.jit(init_params, static_argnums=0)(make, jax.random.key(0))
X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5, WIDTH)), jnp.float32)
SHIFT, CONTEXT = X[:, :1] / 2, {"scale": jnp.asarray(0.5)}


def stacked(params, x, **options):
    return apply_stack(nnx.merge(GRAPH, params), x, SHIFT, CONTEXT, **options)


def loop(params, x):
    layer = get_graph_def(Layer)
    for index in range(LAYERS):
        x = nnx.merge(layer, jax.tree.map(lambda leaf, index=index: leaf[index], params))(x, SHIFT, CONTEXT)
    return x


def value_and_gradients(function):
    value, pull = jax.vjp(function, PARAMS, X)
    return jax.tree.leaves((value, pull(jnp.cos(value))))


@pytest.mark.parametrize("remat", get_args(Remat))
@pytest.mark.parametrize("platform", ["cpu", "gpu"], ids=["unrolled", "scan"])
def test_a_stack_is_a_loop_over_its_layers_in_values_and_gradients(monkeypatch, platform, remat):
    expected = jax.jit(lambda: value_and_gradients(loop))()
    monkeypatch.setattr(jax, "default_backend", lambda: platform)

    def ours(params, x):
        return stacked(params, x, remat=remat)

    text = str(jax.make_jaxpr(ours)(PARAMS, X))
    assert ("remat" in text or "checkpoint" in text) == (remat != "none")
    for left, right in zip(jax.jit(lambda: value_and_gradients(ours))(), expected, strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-5)


class Twice(nnx.Module):
    """Another kind of layer, with the same parameters."""

    def __init__(self, rngs):
        self.up = Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x, function):
        return x + function(self.up(x))


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("platform", ["cpu", "gpu"], ids=["unrolled", "scan"])
def test_groups_take_turns_and_kinds_of_layers_alternate(monkeypatch, platform, remat):
    """Two groups of 3 layers that differ in a function are followed by 2 layers of another kind."""
    stacks = [make_stack(Twice, 6, rngs=nnx.Rngs(0)), make_stack(Twice, 4, rngs=nnx.Rngs(1))]
    graphs, params = zip(*(nnx.split(stack) for stack in stacks), strict=True)
    turns = [[(jnp.tanh,), (jnp.sin,), (jnp.cos,)], [(jnp.square,), (jnp.abs,)]]

    def one_by_one(params, x):
        for stack, index, (function,) in [
            (0, 0, turns[0][0]), (0, 1, turns[0][1]), (0, 2, turns[0][2]), (1, 0, turns[1][0]), (1, 1, turns[1][1]),
            (0, 3, turns[0][0]), (0, 4, turns[0][1]), (0, 5, turns[0][2]), (1, 2, turns[1][0]), (1, 3, turns[1][1]),
        ]:  # fmt: skip
            up = nnx.to_pure_dict(params[stack])["up"]
            x = x + function(x @ up["kernel"][index] + up["bias"][index])
        return (x**2).sum()

    def grouped(params, x):
        merged = [nnx.merge(graph, each) for graph, each in zip(graphs, params, strict=True)]
        x, _ = scan_layers(x, [LayerGroup(*pair) for pair in zip(merged, turns, strict=True)], remat=remat)
        return (x**2).sum()

    expected = jax.tree.leaves(jax.jit(jax.value_and_grad(one_by_one))(params, X / 9))
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    for ours, theirs in zip(
        jax.tree.leaves(jax.jit(jax.value_and_grad(grouped))(params, X / 9)), expected, strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("platform", ["cpu", "gpu"], ids=["unrolled", "scan"])
def test_a_wrapper_calls_each_layer_with_its_own_value_and_collects_outputs(monkeypatch, platform, remat):
    """Layers alternate in a function; a wrapper skips the one whose value is 0, and returns the inputs of all."""
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    stack, weights = make_stack(Twice, 4, rngs=nnx.Rngs(0)), jnp.asarray([1.0, 0.5, 0.0, 2.0])

    def weigh(layer, x, function, weight):
        return x + weight * (layer(x, function) - x), x

    group = LayerGroup(stack, [(jnp.tanh,), (jnp.sin,)], weigh, weights)
    result, (inputs,) = scan_layers(X, [group], remat=remat)
    expected, kernels = X, stack.up.kernel[...]
    for index, function in enumerate([jnp.tanh, jnp.sin] * 2):
        np.testing.assert_allclose(inputs[index], expected, rtol=1e-5, atol=1e-5)
        expected = expected + weights[index] * function(expected @ kernels[index])
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)


def test_layers_have_parameters_of_their_own_along_a_first_axis():
    kernel = PARAMS["up"]["kernel"]
    assert kernel.shape == (LAYERS, WIDTH, 32)
    assert len({np.asarray(layer).tobytes() for layer in kernel}) == LAYERS


@pytest.mark.parametrize("platform", ["cpu", "gpu"], ids=["unrolled", "scan"])
def test_remat_keeps_fewer_bytes(monkeypatch, platform):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    x = jnp.zeros((256, WIDTH))

    def temporary_bytes(remat):
        def loss(params, x):
            return jnp.sin(apply_stack(nnx.merge(GRAPH, params), x, x, CONTEXT, remat=remat)).sum()

        return jax.jit(jax.grad(loss)).lower(PARAMS, x).compile().memory_analysis().temp_size_in_bytes

    # 256 x 32 hidden values are kept for 3 layers without recomputation, and for one layer with it.
    assert temporary_bytes("full") < temporary_bytes("none") - 256 * 32 * 4


@pytest.mark.parametrize(
    ("remat", "products"),
    [
        ("none", 2),
        ("full", 2 + 2),
        ("attention", 2 + 2),
        ("dots", 2),
        ("dots_no_batch", 2),
        ("dots_attention", 2),
        ("offload", 2),
    ],
)
def test_each_remat_policy_recomputes_only_the_products_it_does_not_keep(remat, products):
    """Products of the forward pass are counted in the program of the gradients: kept ones occur once."""

    class Squares(nnx.Module):
        """A product with weights and one of activations with themselves."""

        def __init__(self, rngs):
            self.up = Linear(WIDTH, WIDTH, rngs=rngs)

        def __call__(self, x):
            y = jnp.tanh(self.up(x))
            return jnp.sin(jnp.einsum("bnd,bmd->bnm", y, y)[..., :WIDTH])

    stack = make_stack(Squares, 2, rngs=nnx.Rngs(0))
    graph, params = nnx.split(stack)
    x = jnp.zeros((2, WIDTH, WIDTH))

    def loss(params, x):
        return apply_stack(nnx.merge(graph, params), x, remat=remat).sum()

    again = products + (remat in ("dots_no_batch", "dots_attention", "offload"))  # the product of a batch
    # The backward pass adds two products for each.
    assert count_primitive("dot_general", jax.make_jaxpr(jax.grad(loss))(params, x).jaxpr) == again + 4


@pytest.mark.parametrize("cuts", [(0, 1, 5, 6), (0, 2, 3, 6), (0, 0, 4, 6)])
def test_ranges_of_layers_that_follow_one_another_are_the_whole_stack(cuts):
    """Layers take turns with three shifts, and each third one is followed by a layer of another stack."""
    stacks = [make_stack(Layer, count, rngs=nnx.Rngs(count)) for count in (6, 2)]
    turns = [[(shift * X[:, :1], CONTEXT) for shift in shifts] for shifts in ((1, 2, 3), (4,))]

    def collect(layer, x, shift, context, scale):
        x = scale * layer(x, shift, context)
        return x, x

    def apply(x, layers):
        groups = [LayerGroup(*pair) for pair in zip(stacks, turns, strict=True)]
        groups[0] = groups[0]._replace(wrapper=collect, values=jnp.linspace(1, 2, 6)[layers])
        return scan_layers(x, groups, layers=layers)

    expected, (outputs, _) = apply(X, slice(None))
    x, collected = X, []
    for start, stop in itertools.pairwise(cuts):
        x, (part, _) = apply(x, slice(start, stop))
        collected += [] if part is None else [part]
    np.testing.assert_allclose(x, expected, atol=1e-5)
    np.testing.assert_allclose(jnp.concatenate(collected), outputs, atol=1e-5)


def test_a_range_with_a_step_is_refused():
    group = LayerGroup(nnx.merge(GRAPH, PARAMS), [(SHIFT, CONTEXT)])
    with pytest.raises(UserError, match=r"layers follow one another\. Use a range without a step"):
        scan_layers(X, [group], layers=slice(None, None, 2))
