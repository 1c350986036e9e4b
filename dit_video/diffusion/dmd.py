r"""Distribution matching: few-step generators whose samples follow the teacher's distribution (DMD2).

The divergence $KL(p_{fake} \Vert p_{real})$ between the samples of the generator and those of the teacher, both noised
to a time $t$, decreases along (arXiv 2311.18828, eq. 7)

$$s_{fake}(x_t, t) - s_{real}(x_t, t) \propto \hat x_{0, fake}(x_t, t) - \hat x_{0, real}(x_t, t)$$

The real score is the teacher's. The fake score is that of a second model, the critic, which is trained to denoise the
generator's samples, several times per step of the generator in order to keep up with it (arXiv 2405.14867, section
4.2).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_MIN_NORMALIZER = 1e-6
"""Lower bound of the normalizer."""


def matching_gradient(
    generated: Float[Array, "*batch n p"],
    real: Float[Array, "*batch n p"],
    fake: Float[Array, "*batch n p"],
    normalizer: Float[Array, "*batch n 1"],
) -> Float[Array, "*batch n p"]:
    r"""Return the gradient of the samples, $(\hat x_{0, fake} - \hat x_{0, real}) / normalizer$ (2311.18828, eq. 8).

    Args:
      generated: The samples.
      real: The data that the teacher estimates from the noised samples.
      fake: The data that the critic estimates from them.
      normalizer: Mean distance of the teacher's estimate from each sample; see `compute_distance`.
    """
    return (fake - real) / jnp.maximum(normalizer, _MIN_NORMALIZER)


def compute_distance(generated: Float[Array, "*batch p"], real: Float[Array, "*batch p"]) -> Float[Array, "*batch"]:
    """Return the mean absolute difference of two tokens; its mean over a sample's tokens is the normalizer above."""
    return jnp.abs(generated - real).mean(axis=-1)


def matching_loss(generated: Float[Array, "*batch p"], gradient: Float[Array, "*batch p"]) -> Float[Array, "*batch"]:
    """Return a loss per token with this gradient in the samples, up to the mean over a token's values.

    It is half the squared distance to the moved samples. The gradient is treated as a constant, even if it depends on
    the generator's parameters.
    """
    expected = jax.lax.stop_gradient(generated - gradient)
    return 0.5 * jnp.square((generated - expected).astype(jnp.float32)).mean(axis=-1)
