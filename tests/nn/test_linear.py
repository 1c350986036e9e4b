import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from dit_video.distributed import MeshConfig, make_mesh
from dit_video.distributed.context_parallel import GatheredWeight
from dit_video.nn import Linear
from dit_video.nn.layers import init_weights
from dit_video.nn.lora import attach_lora
from support.jaxprs import list_products
from support.rounded_products import MANTISSA_BITS, round_products


def rough(features_in: int, features_out: int, **options) -> Linear:
    """Return a layer whose bias is not zero."""
    layer = Linear(features_in, features_out, rngs=nnx.Rngs(jax.random.key(0)), **options)
    if layer.bias is not None:
        layer.bias[...] = jnp.arange(1.0, features_out + 1)
    return layer


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("batch", [(), (2, 3, 4)])
def test_linear_is_an_einsum_in_values_and_gradients(batch, platform, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    layer = rough(5, 7)
    kernel, bias = layer.kernel[...], layer.bias[...]
    graph = nnx.graphdef(layer)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(*batch, 5)), jnp.float32)

    def ours(x, kernel, bias):
        return nnx.merge(graph, {"kernel": kernel, "bias": bias})(x)

    def expected(x, kernel, bias):
        return jnp.einsum("...i,io->...o", x, kernel) + bias

    @jax.jit
    def both():
        pairs = []
        for function in (ours, expected):
            value, pull = jax.vjp(function, x, kernel, bias)
            pairs.append([value, *pull(jnp.cos(value))])
        return pairs

    result, reference = both()
    assert result[0].shape == (*batch, 7)
    for left, right in zip(result, reference, strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-5)


def test_without_bias_zero_is_mapped_to_zero():
    layer = rough(5, 7, bias=False)
    assert layer.bias is None
    assert not layer(jnp.zeros((2, 5))).any()


def test_bfloat16_is_computed_in_bfloat16_from_float32_weights():
    layer = rough(64, 8, dtype=jnp.dtype("bfloat16"))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 64)), jnp.float32)
    assert layer.kernel[...].dtype == layer.bias[...].dtype == jnp.float32
    assert layer(x).dtype == jnp.bfloat16
    exact = x @ layer.kernel[...] + layer.bias[...]
    np.testing.assert_allclose(layer(x).astype(jnp.float32), exact, atol=0.1)
    assert (layer(x).astype(jnp.float32) != exact).any()


@pytest.mark.parametrize(("platform", "batch"), [("cpu", (300,)), ("tpu", (3, 100))])
def test_gradients_of_weights_are_summed_in_float32(platform, batch, monkeypatch):
    """A sum over devices in bfloat16 would lose small terms."""
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    layer = rough(8, 6, dtype=jnp.dtype("bfloat16"))
    graph, draw = nnx.graphdef(layer), np.random.default_rng(0)
    weights = {"kernel": layer.kernel[...], "bias": layer.bias[...]}
    x = jnp.asarray(draw.normal(size=(300, 8)), jnp.bfloat16)
    pulled = jnp.asarray(draw.normal(size=(300, 6)), jnp.bfloat16)

    @jax.jit
    def pull(weights, x):
        value, back = jax.vjp(lambda weights, x: nnx.merge(graph, weights)(x.reshape(*batch, 8)), weights, x)
        return back(pulled.reshape(value.shape))

    result, of_x = pull(weights, x)
    wide, above = np.asarray(x, np.float32), np.asarray(pulled, np.float32)
    for name, expected in (("kernel", wide.T @ above), ("bias", above.sum(axis=0))):
        assert result[name].dtype == jnp.float32
        np.testing.assert_allclose(result[name], expected, rtol=1e-4, atol=1e-4)
        assert (result[name].astype(jnp.bfloat16) != result[name]).any()
    kernel = np.asarray(weights["kernel"].astype(jnp.bfloat16), np.float32)
    assert of_x.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(of_x, np.float32), above @ kernel.T, rtol=0.02, atol=0.05)
    # Likelihoods need forward mode.
    tangents = jax.tree.map(jnp.ones_like, (weights, x))
    _, tangent = jax.jvp(lambda weights, x: nnx.merge(graph, weights)(x), (weights, x), tangents)
    expected = wide.sum(axis=1, keepdims=True) + np.asarray(weights["kernel"]).sum(axis=0) + 1
    np.testing.assert_allclose(np.asarray(tangent, np.float32), expected, rtol=0.02, atol=0.2)


def test_initial_weights_follow_their_named_distribution():
    key, shape, fan = jax.random.key(1), (200, 300), (200, 300)
    xavier = init_weights("xavier", key, shape, fan=fan)
    limit = np.sqrt(6 / 500)
    assert np.abs(xavier).max() <= limit
    assert np.std(xavier) == pytest.approx(limit / np.sqrt(3), rel=0.01)
    assert np.std(init_weights("normal", key, shape, fan=fan)) == pytest.approx(0.02, rel=0.01)
    assert not init_weights("zero", key, shape, fan=fan).any()


def make_precise_parts(monkeypatch, *, adapted=False, constrained=False, precision="highest"):
    """Return the value and all gradients of a float32 layer as on an accelerator, and its parameters and input."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    layer, draw = rough(64, 8, precision=precision), np.random.default_rng(0)
    if constrained:
        layer.weight_constraint = GatheredWeight(make_mesh(MeshConfig(), jax.devices()[:1]), PartitionSpec())
    graph, params = nnx.graphdef(layer), nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    if adapted:
        factors = {"a": draw.normal(size=(64, 2)), "b": draw.normal(size=(2, 8)), "scale": np.ones(())}
        params = attach_lora(params, {"kernel": jax.tree.map(jnp.float32, factors)})
    x = jnp.asarray(draw.normal(size=(3, 5, 64)), jnp.float32)

    def compute(params, x):
        value, pull = jax.vjp(lambda params, x: nnx.merge(graph, params)(x), params, x)
        return value, pull(jnp.cos(value))

    return compute, params, x


@pytest.mark.parametrize("options", [{}, {"adapted": True}, {"constrained": True}], ids=str)
def test_a_layer_and_its_gradients_have_the_precision_that_is_set(monkeypatch, options):
    compute, params, x = make_precise_parts(monkeypatch, **options)
    text = jax.jit(compute).trace(params, x).lower(lowering_platforms=("tpu",)).as_text()
    products = list_products(text)
    assert len(products) >= 3
    assert all("precision = [HIGHEST, HIGHEST]" in product for product in products), products
    compute, params, x = make_precise_parts(monkeypatch, **options, precision=None)
    text = jax.jit(compute).trace(params, x).lower(lowering_platforms=("tpu",)).as_text()
    assert not any("HIGHEST" in product for product in list_products(text))


@pytest.mark.parametrize("rounding", MANTISSA_BITS)
def test_precise_layers_are_exact_where_products_round_their_operands(monkeypatch, rounding):
    compute, params, x = make_precise_parts(monkeypatch)
    expected = jax.tree.leaves(compute(params, x))
    for left, right in zip(jax.tree.leaves(round_products(compute, rounding)(params, x)), expected, strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-5)
    compute, params, x = make_precise_parts(monkeypatch, precision=None)
    rounded = jax.tree.leaves(round_products(compute, rounding)(params, x))
    assert max(np.abs(left - right).max() for left, right in zip(rounded, expected, strict=True)) > 1e-3
