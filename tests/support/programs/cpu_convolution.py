"""Compile a convolution on CPU with the XLA flags that the package sets, which keep it out of YNN fusions."""

import jax
import jax.numpy as jnp

import dit_video  # noqa: F401

picture, kernel = jnp.ones((1, 8, 8, 16)), jnp.ones((3, 3, 16, 16))


@jax.jit
def convolve(picture, kernel):
    return jax.lax.conv_general_dilated(picture, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


compiled = convolve.lower(picture, kernel).compile()
assert "ynn" not in compiled.as_text(), compiled.as_text()
assert float(compiled(picture, kernel)[0, 4, 4, 0]) == 144
