"""Muon: momentum whose matrices are brought close to orthogonal ones (Jordan 2024; arXiv 2502.16982).

Newton and Schulz's iteration takes a matrix X, divided by its norm, to p(X) = X (a + b XᵀX + c (XᵀX)²) five times over.
All that it multiplies X by are polynomials of the Gram matrix A = XᵀX, so X need not be in it: with B = a + bA + cA²
the next X is XB and its Gram matrix BAB, and X times the product of all B is the result. For `[m, n]` these are
products of n x n matrices, and two with X, where the iteration on X has ten with X.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_LONG = 2.0
"""Times as many rows as columns from which on the Gram matrix takes fewer products: 17 + 2 m/n against 5 + 10 m/n, of
n x n matrices."""


class MuonState(NamedTuple):
    """What the next update needs."""

    step: Int[Array, ""]
    mu: PyTree
    """the running mean of the gradients"""


def scale_by_muon(rms: float, *, beta: float = 0.95, eps: float = 1e-8) -> optax.GradientTransformation:
    """Nesterov momentum, orthogonalised, of the root mean square that `rms` of an orthogonal matrix's largest has.

    Every parameter is a matrix `[i o]`, a stack of them `[L i o]`, or the kernel of a convolution `[t h w i o]`, which
    maps all that it sees to `o`.

    Args:
      rms: each update is multiplied by `rms sqrt(max(m, n))` for an `m x n` matrix (arXiv 2502.16982, eq. 4).
      beta: decay of the running mean.
      eps: added to the norm that a matrix is divided by.
    """

    def init(params: PyTree) -> MuonState:
        return MuonState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def update(gradients: PyTree, state: MuonState, params: PyTree = None) -> tuple[PyTree, MuonState]:
        step = optax.safe_increment(state.step)
        # As optax has it: both terms are corrected for the mean's start at zero, the momentum as of the step to come.
        ahead, now = 1 - beta ** (step + 1), 1 - beta**step
        mu = jax.tree.map(lambda mean, gradient: beta * mean + (1 - beta) * gradient, state.mu, gradients)

        def of_matrix(mean: Array, gradient: Array) -> Array:
            momentum = beta / ahead * mean + (1 - beta) / now * gradient
            matrices = momentum.reshape(-1, momentum.shape[-1]) if momentum.ndim == 5 else momentum
            scale = rms * max(matrices.shape[-2:]) ** 0.5
            return (scale * orthogonalised(matrices, eps=eps)).reshape(momentum.shape)

        return jax.tree.map(of_matrix, mu, gradients), MuonState(step, mu)

    return optax.GradientTransformation(init, update)


def orthogonalised(x: Float[Array, "*L m n"], *, eps: float = 1e-8) -> Float[Array, "*L m n"]:
    """Matrices with the singular vectors of these, and singular values of about 0.7 to 1.2."""
    if x.shape[-2] < x.shape[-1]:
        return jnp.swapaxes(orthogonalised(jnp.swapaxes(x, -2, -1), eps=eps), -2, -1)
    if x.shape[-2] < _LONG * x.shape[-1]:
        return _iterated(x, eps)
    gram = _gram(x)
    # The sum of the squares of X, which its norm is the root of, is the trace of its Gram matrix.
    scale = 1 / (jnp.sqrt(jnp.trace(gram, axis1=-2, axis2=-1))[..., None, None] + eps)
    return x @ (_of_gram(gram * scale**2) * scale)


def _gram(x: Float[Array, "*L m n"]) -> Float[Array, "*L n n"]:
    return jnp.swapaxes(x, -2, -1) @ x


def _factor(gram: Float[Array, "*L n n"]) -> Float[Array, "*L n n"]:
    """What an iteration multiplies a matrix by, of this Gram matrix."""
    a, b, c = _COEFFICIENTS
    return a * jnp.eye(gram.shape[-1]) + b * gram + c * gram @ gram


def _iterated(x: Float[Array, "*L m n"], eps: float) -> Float[Array, "*L m n"]:
    """The iteration as it is written."""
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + eps)
    for _ in range(_ITERATIONS):
        x = x @ _factor(_gram(x))
    return x


def _of_gram(gram: Float[Array, "*L n n"]) -> Float[Array, "*L n n"]:
    """The product of all factors, by the Gram matrix of every iteration."""
    product = _factor(gram)
    factor = product
    for _ in range(_ITERATIONS - 1):
        gram = factor @ gram @ factor
        gram = (gram + jnp.swapaxes(gram, -2, -1)) / 2  # rounding adds up otherwise
        factor = _factor(gram)
        product = product @ factor
    return product
