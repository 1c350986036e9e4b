"""Convolutions by Winograd's algorithm equal plain ones."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dit_video.nn import CausalConv
from dit_video.nn.cpu import convolution


def plain(x, kernel):
    dimensions = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=dimensions)


@pytest.mark.parametrize("size", [(3, 8, 6), (2, 7, 5), (1, 1, 1), (4, 2, 9)])
@pytest.mark.parametrize("rows", [1, 20, 4096])  # tiles at once: one picture, some, all
def test_values_and_gradients_are_those_of_the_plain_sum(size, rows, monkeypatch):
    monkeypatch.setattr(convolution, "_MAX_TILES", rows)
    shapes = (*size, 5), (3, 3, 5, 4), (*size, 4)
    draw = np.random.default_rng(0)
    x, kernel, weights = (jnp.asarray(draw.normal(size=shape), jnp.float32) for shape in shapes)

    @partial(jax.jit, static_argnums=0)
    def gradients_and_values(function, x, kernel):
        def loss(x, kernel):
            values = function(x, kernel)
            return (values * weights).sum(), values

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(x, kernel)

    (result, values), (expected, plain_values) = (
        gradients_and_values(function, x, kernel) for function in (convolution.winograd_conv, plain)
    )
    for ours, theirs in zip(result, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=5e-5)
    np.testing.assert_allclose(values, plain_values, atol=1e-5)


def test_wide_layers_on_large_frames_use_winograd_on_cpu():
    layer = CausalConv(96, 96, (3, 3, 3), rngs=nnx.Rngs(0))

    def convolutions(side: int) -> int:
        frames = jax.ShapeDtypeStruct((1, 2, side, side, 96), jnp.float32)
        return str(jax.make_jaxpr(layer)(frames)).count("conv_general_dilated")

    if jax.default_backend() != "cpu":
        pytest.skip("forms were measured on CPU alone")
    assert convolutions(16) == 3
    assert convolutions(32) == 0
