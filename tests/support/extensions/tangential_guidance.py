"""Tangential damping of classifier-free guidance (TCFG, arXiv 2503.18137), as a file of another package."""

from dataclasses import dataclass

import jax.numpy as jnp

from dit_video.core.registry import register
from dit_video.diffusion import GUIDANCE_METHODS, GuidanceMethod


@register
@dataclass(frozen=True, kw_only=True)
class TangentialGuidance(GuidanceMethod):
    """The unconditional prediction keeps its part along the first singular vector of both predictions.

    The vector is `a u + b c`, where (a, b) = (cos θ, sin θ) is the first eigenvector of their inner products, so that
    the part is `a (a u + b c)`.
    """

    damping: float = 1.0
    """Share of the other part that is removed; 1 in the paper, 0 is classifier-free guidance."""

    @staticmethod
    def combine(inputs, params, state):
        c, u = inputs.predictions
        gap, product = inputs.mean(u * u - c * c), 2 * inputs.mean(u * c)
        size = jnp.hypot(gap, product)
        cosine, sine = (jnp.where(size > 0, each / jnp.where(size > 0, size, 1), 0) for each in (gap, product))  # of 2θ
        u = u + params["damping"] * ((cosine - 1) * u + sine * c) / 2
        return u + inputs.scales[0] * (c - u), state


GUIDANCE_METHODS["tangential"] = TangentialGuidance()
