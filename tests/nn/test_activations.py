"""Activations against JAX's own, and what they keep."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_video.nn import gelu

X = jnp.linspace(-6, 6, 97, dtype=jnp.float32)


def test_gelu_is_jaxs():
    np.testing.assert_array_equal(gelu(X), jax.nn.gelu(X, approximate=True))
    ours, theirs = (jax.grad(lambda x, of=of: jnp.sin(of(x)).sum())(X) for of in (gelu, jax.nn.gelu))
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    ours, theirs = (jax.vmap(jax.grad(jax.grad(of)))(X) for of in (gelu, jax.nn.gelu))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_it_keeps_its_dtype_and_one_array(dtype):
    x = X.astype(dtype)
    value, pull = jax.vjp(gelu, x)
    assert value.dtype == dtype
    kept = [leaf for leaf in jax.tree.leaves(pull) if jnp.shape(leaf) == x.shape]
    assert len(kept) == 1
    assert len([leaf for leaf in jax.tree.leaves(jax.vjp(jax.nn.gelu, x)[1]) if jnp.shape(leaf) == x.shape]) > 1
