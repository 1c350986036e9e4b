import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
