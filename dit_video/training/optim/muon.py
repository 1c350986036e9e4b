"""Muon: momentum with orthogonalized matrices (Jordan 2024; arXiv 2502.16982).

The Newton-Schulz iteration applies p(X) = X (a + b XᵀX + c (XᵀX)²) five times to a matrix X, divided by its norm. X is
only ever multiplied by polynomials of the Gram matrix A = XᵀX, so the iteration can run on A alone: with
B = a + bA + cA² the next X is XB, its Gram matrix is BAB, and the result is X times the product of all B. For a matrix
`[m, n]` this takes products of n x n matrices and two products with X, whereas the iteration on X takes ten with X.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_MIN_GRAM_RATIO = 2.0
"""Ratio of rows to columns from which the iteration on the Gram matrix is cheaper: it takes 17 + 2 m/n products of
n x n matrices instead of 5 + 10 m/n."""


class MuonState(NamedTuple):
    """State of the Muon optimizer."""

    step: Int[Array, ""]
    mu: PyTree
    """Running mean of the gradients."""


def scale_by_muon(rms: float, *, beta: float = 0.95, eps: float = 1e-8) -> optax.GradientTransformation:
    """Return Nesterov momentum, orthogonalized and scaled to a root mean square of about `rms` per update.

    Each parameter is a matrix `[i o]`, a stack of matrices `[L i o]`, or a convolution kernel `[t h w i o]`, which is
    treated as a matrix with `o` columns.

    Args:
      rms: Each update is multiplied by `rms sqrt(max(m, n))` for an `m x n` matrix (arXiv 2502.16982, eq. 4).
      beta: Decay of the running mean.
      eps: Constant added to the norm that a matrix is divided by.
    """

    def init(params: PyTree) -> MuonState:
        return MuonState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def update(gradients: PyTree, state: MuonState, params: PyTree = None) -> tuple[PyTree, MuonState]:
        step = optax.safe_increment(state.step)
        # Bias correction as in optax: Nesterov momentum uses the correction of the next step for the running mean.
        next_correction, correction = 1 - beta ** (step + 1), 1 - beta**step
        mu = jax.tree.map(lambda mean, gradient: beta * mean + (1 - beta) * gradient, state.mu, gradients)

        def orthogonalize_momentum(mean: Array, gradient: Array) -> Array:
            momentum = beta / next_correction * mean + (1 - beta) / correction * gradient
            matrices = momentum.reshape(-1, momentum.shape[-1]) if momentum.ndim == 5 else momentum
            scale = rms * max(matrices.shape[-2:]) ** 0.5
            return (scale * orthogonalize(matrices, eps=eps)).reshape(momentum.shape)

        return jax.tree.map(orthogonalize_momentum, mu, gradients), MuonState(step, mu)

    return optax.GradientTransformation(init, update)


def orthogonalize(x: Float[Array, "*L m n"], *, eps: float = 1e-8) -> Float[Array, "*L m n"]:
    """Return matrices with the same singular vectors, and singular values of about 0.7 to 1.2."""
    if x.shape[-2] < x.shape[-1]:
        return jnp.swapaxes(orthogonalize(jnp.swapaxes(x, -2, -1), eps=eps), -2, -1)
    if x.shape[-2] < _MIN_GRAM_RATIO * x.shape[-1]:
        return _iterate(x, eps)
    gram = _compute_gram(x)
    # The squared Frobenius norm of X is the trace of its Gram matrix.
    scale = 1 / (jnp.sqrt(jnp.trace(gram, axis1=-2, axis2=-1))[..., None, None] + eps)
    return x @ (_iterate_gram(gram * scale**2) * scale)


def _compute_gram(x: Float[Array, "*L m n"]) -> Float[Array, "*L n n"]:
    return jnp.swapaxes(x, -2, -1) @ x


def _compute_factor(gram: Float[Array, "*L n n"]) -> Float[Array, "*L n n"]:
    """Return the factor B of an iteration, from the Gram matrix."""
    a, b, c = _COEFFICIENTS
    return a * jnp.eye(gram.shape[-1]) + b * gram + c * gram @ gram


def _iterate(x: Float[Array, "*L m n"], eps: float) -> Float[Array, "*L m n"]:
    """Return the result of the iteration on X itself."""
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + eps)
    for _ in range(_ITERATIONS):
        x = x @ _compute_factor(_compute_gram(x))
    return x


def _iterate_gram(gram: Float[Array, "*L n n"]) -> Float[Array, "*L n n"]:
    """Return the product of all factors B, by the iteration on the Gram matrix."""
    product = _compute_factor(gram)
    factor = product
    for _ in range(_ITERATIONS - 1):
        gram = factor @ gram @ factor
        gram = (gram + jnp.swapaxes(gram, -2, -1)) / 2  # keeps it symmetric; otherwise rounding errors accumulate
        factor = _compute_factor(gram)
        product = product @ factor
    return product
