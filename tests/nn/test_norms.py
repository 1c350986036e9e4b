import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_video.core.errors import UserError
from dit_video.nn import GroupNorm, LayerNorm, RmsNorm, layer_norm

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
