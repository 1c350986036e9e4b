"""A model on packed rows as the one function that diffusion knows."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dit_video.backbones.dit.conditioning import Given
from dit_video.backbones.dit.model import Dit
from dit_video.backbones.wan.model import WanDit
from dit_video.core.typing import AnyArray
from dit_video.tokens import segment_max


def packed_denoise(
    dit: Dit | WanDit,
    *,
    segments: Int[AnyArray, "B N"],
    coordinates: Float[AnyArray, "B N 3"],
    context: Float[Array, "B S E"] | None,
    context_segments: Int[Array, "B S"] | None,
    count: int,
    given: Given = Given(),
) -> Callable[[Float[Array, "B N p"], Float[Array, "B N"]], Float[Array, "B N prediction"]]:
    """`denoise(noisy, time)` of rows with up to `count` segments.

    All tokens of a segment have one time, but for a model with a time per token; that one's segments count as being
    at the largest time of their tokens, what is known being at 0. A model without context has None of it. One that
    predicts a variance gives it behind the whole prediction, as values of their own.
    """
    row: dict[str, Any] = {
        "segments": jnp.asarray(segments),
        "coordinates": jnp.asarray(coordinates),
        "context": context,
        "context_segments": context_segments,
    }

    def denoise(noisy, time):
        per_token = {"token_time": time} if dit.config.time == "token" else {}
        at = segment_max(time, row["segments"], count=count)
        prediction = dit(noisy, at, **row, given=given._replace(**per_token))
        if prediction.shape[-1] == noisy.shape[-1]:
            return prediction
        # At each place of a patch stands the prediction, then the variance.
        places = prediction.reshape(*noisy.shape[:2], dit.config.patch.volume, 2, -1)
        return jnp.swapaxes(places, 2, 3).reshape(*noisy.shape[:2], -1)

    return denoise
