"""Convolutions on CPUs equal plain ones."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dit_video.nn import CausalConv
from dit_video.nn.cpu import convolution
from dit_video.nn.cpu import convolution as module
from dit_video.nn.cpu.convolution import im2col_conv

SHAPES = {
    "space and time": ((3, 3, 3), 4, 6),
    "an odd number of channels": ((1, 3, 5), 3, 5),
    "time alone": ((3, 1, 1), 4, 2),
    "one channel to one": ((2, 3, 1), 1, 1),
}


def three_dimensional(x, kernel, bias):
    space = [(size // 2, size // 2) for size in kernel.shape[1:3]]
    y = jax.lax.conv_general_dilated(
        x, kernel, (1, 1, 1), [(0, 0), *space], dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
    )
    return y + bias


def arrays(kernel, width, out):
    """Return a clip, a kernel, a bias and a gradient of the output, with values that bfloat16 holds exactly."""
    draw = np.random.default_rng(0)
    shapes = ((2, 4, 5, 6, width), (*kernel, width, out), (out,), (2, 5 - kernel[0], 5, 6, out))
    return tuple(jnp.asarray(draw.normal(size=shape), jnp.bfloat16).astype(jnp.float32) for shape in shapes)


def values(function, x, kernel, bias, gradient):
    y, pull = jax.vjp(function, x, kernel, bias)
    return (y, *pull(gradient))


@pytest.mark.parametrize("limit", [2**26, 1], ids=["at once", "frame by frame"])
@pytest.mark.parametrize("dtype", [pytest.param(jnp.bfloat16, marks=pytest.mark.slow), jnp.float32])
@pytest.mark.parametrize("case", SHAPES)
def test_im2col_equals_the_convolution_in_values_and_gradients(case, dtype, limit, monkeypatch):
    monkeypatch.setattr(module, "MAX_COLUMN_BYTES", limit)
    inputs = arrays(*SHAPES[case])
    result = jax.jit(lambda *inputs: values(lambda *inputs: im2col_conv(*inputs, dtype), *inputs))(*inputs)
    for left, right in zip(result, jax.jit(functools.partial(values, three_dimensional))(*inputs), strict=True):
        assert left.dtype == jnp.float32
        np.testing.assert_allclose(left, right, rtol=1e-5, atol=2e-5)


def test_the_gradient_of_the_input_has_its_dtype_and_that_of_the_kernel_is_float32():
    x, *rest = arrays((3, 3, 3), 4, 6)
    result = jax.jit(lambda *inputs: values(im2col_conv, *inputs))(x.astype(jnp.bfloat16), *rest)
    assert [array.dtype for array in result] == [jnp.float32, jnp.bfloat16, jnp.float32, jnp.float32]


def test_recomputation_in_the_backward_pass_gives_the_same_gradients():
    inputs = arrays((3, 3, 3), 4, 6)
    kept = jax.jit(lambda *inputs: values(im2col_conv, *inputs))(*inputs)
    again = jax.jit(lambda *inputs: values(jax.checkpoint(im2col_conv), *inputs))(*inputs)
    jax.tree.map(np.testing.assert_array_equal, kept, again)


# Convolutions by Winograd's algorithm equal plain ones


def plain(x, kernel):
    dimensions = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=dimensions)


@pytest.mark.nightly
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
