"""Muon: momentum with orthogonalized matrices (Jordan 2024; arXiv 2502.16982).

The Newton-Schulz iteration applies p(X) = X (a + b XᵀX + c (XᵀX)²) five times to a matrix X, divided by its norm. It
has two forms:

- The iteration on X itself corrects rounding errors of each step in the next one, so that products of bfloat16 are
  enough: accelerators compute it so, as the authors' implementation does.
- X is only ever multiplied by polynomials of the Gram matrix A = XᵀX, so the iteration can run on A alone: with
  B = a + bA + cA² the next X is XB, its Gram matrix is BAB, and the result is X times the product of all B. For an
  `m x n` matrix this takes products of n x n matrices and two products with X, whereas the iteration on X takes ten
  with X. It needs products in float32: operands that are rounded to bfloat16 or TF32 give A negative eigenvalues, which
  grow by a factor of about 12 with each iteration. CPUs, which compute in float32, use it for tall matrices.

On a mesh each device orthogonalizes whole matrices of a stack. Products of sharded matrices would gather or reduce the
stack again and again, or be computed on several devices alike.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int, PyTree

from dit_video.distributed.mesh import AnyMesh
from dit_video.distributed.sharding import apply_to_matrices, make_shardings

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


def scale_by_muon(
    rms: float, *, beta: float = 0.95, eps: float = 1e-8, mesh: AnyMesh | None = None
) -> optax.GradientTransformation:
    """Return Nesterov momentum, orthogonalized and scaled to a root mean square of about `rms` per update.

    Each parameter is a matrix `[i o]`, a stack of matrices `[L i o]`, or a convolution kernel `[t h w i o]`, which is
    treated as a matrix with `o` columns.

    Args:
      rms: Each update is multiplied by `rms sqrt(max(m, n))` for an `m x n` matrix (arXiv 2502.16982, eq. 4).
      beta: Decay of the running mean.
      eps: Constant added to the norm that a matrix is divided by.
      mesh: Mesh over whose devices the matrices of a stack are divided; None for a single device.
    """

    def init(params: PyTree) -> MuonState:
        return MuonState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def update(gradients: PyTree, state: MuonState, params: PyTree = None) -> tuple[PyTree, MuonState]:
        step = optax.safe_increment(state.step)
        # Bias correction as in optax: Nesterov momentum uses the correction of the next step for the running mean.
        next_correction, correction = 1 - beta ** (step + 1), 1 - beta**step
        mu = jax.tree.map(lambda mean, gradient: beta * mean + (1 - beta) * gradient, state.mu, gradients)

        shardings = make_shardings(mu, mesh) if mesh is not None and mesh.size > 1 else jax.tree.map(lambda _: None, mu)

        def orthogonalize_momentum(mean: Array, gradient: Array, sharding: NamedSharding | None) -> Array:
            momentum = beta / next_correction * mean + (1 - beta) / correction * gradient
            matrices = momentum.reshape(-1, momentum.shape[-1]) if momentum.ndim == 5 else momentum
            scale = rms * max(matrices.shape[-2:]) ** 0.5
            # Rounded before it is divided, so that devices exchange no more bytes than are used.
            matrices, run = matrices.astype(_get_product_dtype()), functools.partial(orthogonalize, eps=eps)
            if sharding is None or matrices.ndim != 3:
                orthogonal = run(matrices)
            else:
                orthogonal = apply_to_matrices(run, matrices, sharding)
            return (scale * orthogonal.astype(jnp.float32)).reshape(momentum.shape)

        return jax.tree.map(orthogonalize_momentum, mu, gradients, shardings), MuonState(step, mu)

    return optax.GradientTransformation(init, update)


def orthogonalize(x: Float[Array, "*L m n"], *, eps: float = 1e-8) -> Float[Array, "*L m n"]:
    """Return matrices with the same singular vectors, and singular values of about 0.7 to 1.2.

    They are computed and returned in float32 on CPUs, and in bfloat16 elsewhere.
    """
    if x.shape[-2] < x.shape[-1]:
        return jnp.swapaxes(orthogonalize(jnp.swapaxes(x, -2, -1), eps=eps), -2, -1)
    x, dtype = x.astype(jnp.float32), _get_product_dtype()
    x = (x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + eps)).astype(dtype)
    if dtype == jnp.float32 and x.shape[-2] >= _MIN_GRAM_RATIO * x.shape[-1]:
        return _multiply(x, _iterate_gram(_compute_gram(x)))
    return _iterate(x)


def _get_product_dtype() -> Any:
    """Return the dtype of products' operands, whose result is float32."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


def _multiply(left: Float[Array, "*L m k"], right: Float[Array, "*L k n"]) -> Float[Array, "*L m n"]:
    """Return the product in float32, with both operands in the dtype of the first."""
    return jnp.matmul(left, right.astype(left.dtype), preferred_element_type=jnp.float32)


def _compute_gram(x: Float[Array, "*L m n"]) -> Float[Array, "*L n n"]:
    return _multiply(jnp.swapaxes(x, -2, -1), x)


def _compute_factor(gram: Float[Array, "*L n n"], dtype: Any) -> Float[Array, "*L n n"]:
    """Return the factor B of an iteration, from the Gram matrix; `dtype` is the operands' dtype."""
    a, b, c = _COEFFICIENTS
    return a * jnp.eye(gram.shape[-1]) + b * gram + c * _multiply(gram.astype(dtype), gram)


def _iterate(x: Float[Array, "*L m n"]) -> Float[Array, "*L m n"]:
    """Return the result of the iteration on X itself."""
    for _ in range(_ITERATIONS):
        x = _multiply(x, _compute_factor(_compute_gram(x), x.dtype)).astype(x.dtype)
    return x


def _iterate_gram(gram: Float[Array, "*L n n"]) -> Float[Array, "*L n n"]:
    """Return the product of all factors B, by the iteration on the Gram matrix."""
    product = factor = _compute_factor(gram, gram.dtype)
    for _ in range(_ITERATIONS - 1):
        gram = _multiply(_multiply(factor, gram), factor)
        gram = (gram + jnp.swapaxes(gram, -2, -1)) / 2  # keeps it symmetric; otherwise rounding errors accumulate
        factor = _compute_factor(gram, gram.dtype)
        product = _multiply(product, factor)
    return product
