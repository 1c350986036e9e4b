"""Activations against JAX's own, and the arrays they keep for the backward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_video.nn import gelu

X = jnp.linspace(-6, 6, 97, dtype=jnp.float32)


def test_gelu_equals_jax():
    np.testing.assert_array_equal(gelu(X), jax.nn.gelu(X, approximate=True))
    ours, theirs = (
        jax.grad(lambda x, function=function: jnp.sin(function(x)).sum())(X) for function in (gelu, jax.nn.gelu)
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    ours, theirs = (jax.vmap(jax.grad(jax.grad(function)))(X) for function in (gelu, jax.nn.gelu))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gelu_keeps_the_dtype_and_one_array_for_the_backward_pass(dtype):
    x = X.astype(dtype)
    value, pull = jax.vjp(gelu, x)
    assert value.dtype == dtype
    kept = [leaf for leaf in jax.tree.leaves(pull) if jnp.shape(leaf) == x.shape]
    assert len(kept) == 1
    assert len([leaf for leaf in jax.tree.leaves(jax.vjp(jax.nn.gelu, x)[1]) if jnp.shape(leaf) == x.shape]) > 1
