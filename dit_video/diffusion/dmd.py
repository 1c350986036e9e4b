r"""Distribution matching: a generator of few steps whose samples are distributed as the teacher's (DMD2).

The divergence $KL(p_{fake} \Vert p_{real})$ between what a generator makes and what the teacher does, both noised to a
time $t$, falls along (arXiv 2311.18828, eq. 7)

$$s_{fake}(x_t, t) - s_{real}(x_t, t) \propto \hat x_{0, fake}(x_t, t) - \hat x_{0, real}(x_t, t)$$

where the real score is the teacher's, and the fake one that of a second model, the critic, which is trained to denoise
the generator's samples; several times a step of the generator, which it has to keep up with (arXiv 2405.14867,
section 4.2).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_LEAST = 1e-6


def matching_gradient(
    generated: Float[Array, "*batch n p"],
    real: Float[Array, "*batch n p"],
    fake: Float[Array, "*batch n p"],
    size: Float[Array, "*batch n 1"],
) -> Float[Array, "*batch n p"]:
    r"""Against which samples move: $(\hat x_{0, fake} - \hat x_{0, real}) / size$ (arXiv 2311.18828, eq. 8).

    Args:
      generated: the samples.
      real: the data that the teacher estimates in the noised samples.
      fake: what the critic estimates in them.
      size: how far the teacher's estimate lies from each sample, on average over its values: see `distance`.
    """
    return (fake - real) / jnp.maximum(size, _LEAST)


def distance(generated: Float[Array, "*batch p"], real: Float[Array, "*batch p"]) -> Float[Array, "*batch"]:
    """The mean of the absolute difference of two tokens; its mean over a sample's tokens is the normaliser above."""
    return jnp.abs(generated - real).mean(axis=-1)


def matching_loss(generated: Float[Array, "*batch p"], gradient: Float[Array, "*batch p"]) -> Float[Array, "*batch"]:
    """What has this gradient in the samples, but for the mean over a token's values: half its square, for every token.

    The gradient is held still, whatever the samples' parameters have to do with it.
    """
    wanted = jax.lax.stop_gradient(generated - gradient)
    return 0.5 * jnp.square((generated - wanted).astype(jnp.float32)).mean(axis=-1)
