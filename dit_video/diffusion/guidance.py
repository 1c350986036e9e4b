"""Guidance: a `denoise` made of two."""

from jaxtyping import Array, Float

from dit_video.diffusion.predictions import Denoise


def classifier_free(conditional: Denoise, unconditional: Denoise, scale: Float[Array, ""] | float) -> Denoise:
    """`u + scale * (c - u)` (arXiv 2207.12598); scale 1 is the conditional model.

    The unconditional branch may be given a negative prompt instead of nothing.
    """

    def guided(noisy, time):
        c, u = conditional(noisy, time), unconditional(noisy, time)
        return u + scale * (c - u)

    return guided
