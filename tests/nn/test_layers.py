"""Layers: linear maps, norms, embeddings, activations and modulation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from dit_video.core.errors import UserError
from dit_video.distributed import Parallelism, make_mesh
from dit_video.distributed.context_parallel import GatheredWeight
from dit_video.nn import (
    AttentionInputs,
    CausalConv,
    GroupNorm,
    LayerNorm,
    Linear,
    RmsNorm,
    gelu,
    layer_norm,
    make_attention,
    modulate,
    sinusoidal_embedding,
)
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
        layer.weight_constraint = GatheredWeight(make_mesh(Parallelism(), jax.devices()[:1]), PartitionSpec())
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


# Norms


X = np.random.default_rng(0).normal(3.0, 2.0, size=(2, 3, 32)).astype(np.float32)


def test_layer_norm_has_zero_mean_and_unit_deviation():
    expected = (X - X.mean(-1, keepdims=True)) / X.std(-1, keepdims=True)
    np.testing.assert_allclose(layer_norm(jnp.asarray(X)), expected, atol=1e-5)


@pytest.mark.parametrize(("norm", "centre"), [(layer_norm, True), (RmsNorm(32), False)])
def test_derivatives_are_those_of_the_operations(norm, centre):
    def plain(x):
        centred = x - x.mean(-1, keepdims=True) if centre else x
        return centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-6)

    weights, step = (jnp.asarray(np.random.default_rng(seed).normal(size=X.shape), jnp.float32) for seed in (1, 2))

    def twice(norm):
        return jax.grad(lambda x: (weights * jax.jvp(norm, (x,), (step,))[1]).sum())

    for derive in (lambda norm: lambda x: jax.vjp(norm, x)[1](weights)[0], twice):
        result, expected = (jax.jit(derive(norm))(jnp.asarray(X)) for norm in (norm, plain))
        np.testing.assert_allclose(result, expected, atol=1e-5)


def test_layer_norm_ignores_shift_and_scale_of_its_input():
    normal = layer_norm(jnp.asarray(X))
    np.testing.assert_allclose(layer_norm(jnp.asarray(5 * X + 7)), normal, atol=1e-5)


def test_rms_norm_divides_by_the_root_mean_square_and_scales():
    layer = RmsNorm(32)
    np.testing.assert_allclose(layer(jnp.asarray(X)), X / np.sqrt((X**2).mean(-1, keepdims=True)), rtol=1e-5)
    layer.scale[...] = jnp.arange(32.0)
    np.testing.assert_allclose(
        layer(jnp.asarray(X)), X / np.sqrt((X**2).mean(-1, keepdims=True)) * np.arange(32), rtol=1e-5
    )


def test_learned_layer_norm_starts_as_the_plain_one():
    layer = LayerNorm(32)
    np.testing.assert_allclose(layer(jnp.asarray(X)), layer_norm(jnp.asarray(X)), atol=1e-6)
    layer.scale[...], layer.shift[...] = 2 * jnp.ones(32), jnp.arange(32.0)
    np.testing.assert_allclose(layer(jnp.asarray(X)), 2 * layer_norm(jnp.asarray(X)) + np.arange(32), atol=1e-5)


def test_statistics_of_bfloat16_are_float32():
    # The mean of 256 values around 100 is off by more than their deviation if summed in bfloat16.
    values = jnp.asarray(100 + np.random.default_rng(1).normal(size=(1, 256)), jnp.bfloat16)
    exact = layer_norm(values.astype(jnp.float32))
    for layer in (layer_norm, LayerNorm(256)):
        assert layer(values).dtype == jnp.bfloat16
        np.testing.assert_allclose(layer(values).astype(jnp.float32), exact, rtol=0.01, atol=0.01)
    rms = RmsNorm(256)(values)
    assert rms.dtype == jnp.bfloat16
    np.testing.assert_allclose(rms.astype(jnp.float32), values.astype(jnp.float32) / 100, rtol=0.02)


def test_a_constant_input_has_finite_values_and_gradients():
    for layer in (layer_norm, RmsNorm(8), LayerNorm(8)):
        run = jax.jit(jax.value_and_grad(lambda x, layer=layer: jnp.sin(layer(x)).sum()))
        for value in (0.0, 4.0):
            out, gradient = run(jnp.full((8,), value))
            assert np.isfinite(out)
            assert np.isfinite(gradient).all()


def test_group_norm_is_of_each_frame_and_group():
    layer = GroupNorm(6, 2, eps=0.0)
    x = np.random.default_rng(1).normal(2.0, 3.0, size=(2, 3, 4, 5, 6)).astype(np.float32)
    groups = x.reshape(2, 3, 20, 2, 3)
    expected = (groups - groups.mean((2, 4), keepdims=True)) / groups.std((2, 4), keepdims=True)
    np.testing.assert_allclose(layer(jnp.asarray(x)), expected.reshape(x.shape), atol=1e-5)
    layer.scale[...], layer.shift[...] = jnp.arange(6.0), jnp.arange(6.0, 12.0)
    expected = expected.reshape(x.shape) * np.arange(6) + np.arange(6, 12)
    np.testing.assert_allclose(layer(jnp.asarray(x)), expected, atol=3e-5)


def test_group_norm_of_segments_is_that_of_each_alone():
    layer = GroupNorm(4, 2)
    x = np.random.default_rng(2).normal(2.0, 3.0, size=(1, 2, 8, 12, 4)).astype(np.float32)
    segments = jnp.asarray([[[1, 1, 0, 2, 2, 2]] * 3 + [[0] * 6]])  # a cell is 2x2 pixels
    together = jax.jit(lambda x: layer(x, segments))(x)
    np.testing.assert_allclose(together[:, :, :6, :4], jax.jit(lambda x: layer(x))(x[:, :, :6, :4]), atol=1e-5)
    np.testing.assert_allclose(together[:, :, :6, 6:], jax.jit(lambda x: layer(x))(x[:, :, :6, 6:]), atol=1e-5)


def test_group_norm_refuses_groups_that_do_not_divide_the_channels():
    with pytest.raises(UserError, match="6 channels are not divisible by 4 groups"):
        GroupNorm(6, 4)


# Activations against JAX's own, and the arrays they keep for the backward pass


POINTS = jnp.linspace(-6, 6, 97, dtype=jnp.float32)


def test_gelu_equals_jax():
    np.testing.assert_array_equal(gelu(POINTS), jax.nn.gelu(POINTS, approximate=True))
    ours, theirs = (
        jax.grad(lambda x, function=function: jnp.sin(function(x)).sum())(POINTS) for function in (gelu, jax.nn.gelu)
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    ours, theirs = (jax.vmap(jax.grad(jax.grad(function)))(POINTS) for function in (gelu, jax.nn.gelu))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gelu_keeps_the_dtype_and_one_array_for_the_backward_pass(dtype):
    x = POINTS.astype(dtype)
    value, pull = jax.vjp(gelu, x)
    assert value.dtype == dtype
    kept = [leaf for leaf in jax.tree.leaves(pull) if jnp.shape(leaf) == x.shape]
    assert len(kept) == 1
    assert len([leaf for leaf in jax.tree.leaves(jax.vjp(jax.nn.gelu, x)[1]) if jnp.shape(leaf) == x.shape]) > 1


# Embeddings


def test_an_embedding_is_cosines_then_sines_of_falling_frequencies():
    values = np.asarray([[0.0, 1.5], [40.0, 999.0]], np.float32)
    frequencies = 10_000.0 ** -(np.arange(4) / 4)
    angles = values[..., None] * frequencies
    expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)
    np.testing.assert_allclose(sinusoidal_embedding(jnp.asarray(values), 8), expected, atol=1e-4)


def test_zero_is_embedded_as_ones_then_zeros():
    assert sinusoidal_embedding(jnp.zeros(()), 6).tolist() == [1, 1, 1, 0, 0, 0]


def test_integers_are_embedded_like_floats():
    np.testing.assert_array_equal(sinusoidal_embedding(jnp.arange(5), 8), sinusoidal_embedding(jnp.arange(5.0), 8))


def test_the_product_of_two_embeddings_depends_on_their_difference_only():
    code = np.asarray(sinusoidal_embedding(jnp.asarray([2.0, 5.0, 12.0, 15.0]), 64))
    assert code[0] @ code[1] == pytest.approx(code[2] @ code[3], rel=1e-4)
    assert code[0] @ code[1] != pytest.approx(code[0] @ code[2], rel=1e-2)


def test_the_slowest_frequency_follows_from_the_maximal_period():
    # The slowest pair of width 4 turns by sqrt(period) times less than the fastest.
    assert sinusoidal_embedding(jnp.asarray(1.0), 4, max_period=100.0)[1] == pytest.approx(np.cos(0.1), rel=1e-6)


# Modulation


DRAW = np.random.default_rng(0)
TOKENS, SHIFT, SCALE = (jnp.asarray(DRAW.normal(size=(2, 3, 16)), jnp.float32) for _ in range(3))


def test_modulation_scales_and_shifts_the_norm():
    np.testing.assert_allclose(
        modulate(TOKENS, SHIFT, SCALE), layer_norm(TOKENS) * (1 + SCALE) + SHIFT, rtol=1e-6, atol=1e-6
    )


def test_zero_modulation_is_the_norm():
    np.testing.assert_array_equal(modulate(TOKENS, 0 * SHIFT, 0 * SCALE), layer_norm(TOKENS))


def test_modulation_is_computed_in_float32_and_keeps_the_dtype():
    x = TOKENS.astype(jnp.bfloat16)
    result = modulate(x, SHIFT, SCALE)
    assert result.dtype == jnp.bfloat16
    expected = (layer_norm(x.astype(jnp.float32)) * (1 + SCALE) + SHIFT).astype(jnp.bfloat16)
    np.testing.assert_array_equal(result.astype(jnp.float32), expected.astype(jnp.float32))


# Layers equal those of torch in values and gradients


def arrays(*shapes):
    generator = np.random.default_rng(0)
    return [generator.normal(size=shape).astype(np.float32) for shape in shapes]


@pytest.mark.parity
@pytest.mark.parametrize("backend", ["dense", "chunked"])
def test_attention_equals_torch(backend):
    torch = pytest.importorskip("torch")
    q, k, v, weight = arrays((2, 24, 3, 8), (2, 16, 3, 8), (2, 16, 3, 8), (2, 24, 3, 8))
    q_segments = np.repeat([[1, 2, 3]], 8, axis=1).repeat(2, axis=0).astype(np.int32)
    kv_segments = np.sort(np.repeat([[1, 2, 3, 3]], 4, axis=1), axis=1).repeat(2, axis=0).astype(np.int32)
    attention = make_attention(backend, chunk=10)
    inputs = AttentionInputs(jnp.asarray(q_segments), jnp.asarray(kv_segments))

    def loss(q, k, v):
        return (attention(q, k, v, inputs) * weight).sum()

    value, gradients = jax.value_and_grad(loss, argnums=(0, 1, 2))(*map(jnp.asarray, (q, k, v)))
    tensors = [torch.from_numpy(array).requires_grad_() for array in (q, k, v)]
    mask = torch.from_numpy(q_segments[:, None, :, None] == kv_segments[:, None, None, :])
    mixed = torch.nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in tensors), attn_mask=mask)
    expected = (mixed.transpose(1, 2) * torch.from_numpy(weight)).sum()
    expected.backward()
    np.testing.assert_allclose(float(value), float(expected.detach()), rtol=1e-5, atol=1e-4)
    for ours, tensor in zip(gradients, tensors, strict=True):
        np.testing.assert_allclose(np.asarray(ours), tensor.grad.numpy(), atol=1e-5)


@pytest.mark.parity
def test_causal_convolution_equals_torch():
    torch = pytest.importorskip("torch")
    x, weight = arrays((2, 5, 6, 7, 3), (2, 5, 6, 7, 4))
    conv = CausalConv(3, 4, (3, 3, 3), rngs=nnx.Rngs(jax.random.key(0)))
    graph, params = nnx.split(conv)

    def loss(x, params):
        return (nnx.merge(graph, params)(x) * weight).sum()

    value, (to_x, to_params) = jax.value_and_grad(loss, argnums=(0, 1))(jnp.asarray(x), params)
    tensor = torch.from_numpy(x).requires_grad_()
    kernel = torch.from_numpy(np.asarray(conv.kernel[...]).transpose(4, 3, 0, 1, 2).copy()).requires_grad_()
    bias = torch.from_numpy(np.array(conv.bias[...])).requires_grad_()
    channels_first = tensor.permute(0, 4, 1, 2, 3)
    padded = torch.cat([channels_first[:, :, :1].repeat(1, 1, 2, 1, 1), channels_first], dim=2)
    convolved = torch.nn.functional.conv3d(padded, kernel, bias, padding=(0, 1, 1))
    expected = (convolved.permute(0, 2, 3, 4, 1) * torch.from_numpy(weight)).sum()
    expected.backward()
    np.testing.assert_allclose(float(value), float(expected.detach()), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.asarray(to_x), tensor.grad.numpy(), atol=1e-4)
    ours = nnx.to_pure_dict(to_params)
    np.testing.assert_allclose(np.asarray(ours["kernel"]), kernel.grad.numpy().transpose(2, 3, 4, 1, 0), atol=1e-3)
    np.testing.assert_allclose(np.asarray(ours["bias"]), bias.grad.numpy(), atol=1e-3)
