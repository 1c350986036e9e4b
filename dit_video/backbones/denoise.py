"""Adapter from a model on packed rows to the denoising function that diffusion calls."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dit_video.backbones.dit.conditioning import Given
from dit_video.backbones.dit.model import Dit
from dit_video.backbones.wan.model import WanDit
from dit_video.core.typing import AnyArray
from dit_video.diffusion import DenoiseFn
from dit_video.tokens import segment_max


def make_denoise_fn(
    dit: Dit | WanDit,
    *,
    segments: Int[AnyArray, "B N"],
    positions: Float[AnyArray, "B N 3"],
    context: Float[Array, "B S E"] | None,
    context_segments: Int[Array, "B S"] | None,
    count: int,
    given: Given = Given(),
) -> DenoiseFn:
    """Return the `denoise` of rows with up to `count` segments, from `B N p` and times `B N` to `B N prediction`.

    All tokens of a segment have one time, except in a model with a time per token. There, the time of a segment is the
    largest one of its tokens, since known tokens are at time 0. The context is None for models without context. A
    predicted variance follows the whole prediction: the two are not interleaved per position as in the model's output.
    """
    row: dict[str, Any] = {"segments": jnp.asarray(segments), "positions": jnp.asarray(positions)}
    row |= {"context": context, "context_segments": context_segments}

    def denoise(noisy, time, state):
        per_token = {"token_time": time} if dit.config.time == "token" else {}
        segment_time = segment_max(time, row["segments"], count=count)
        prediction = dit(noisy, segment_time, **row, given=given._replace(**per_token))
        if prediction.shape[-1] == noisy.shape[-1]:
            return prediction, state
        # The model's output holds prediction and variance for each position in a patch: (patch, 2, c) -> (2, patch, c).
        interleaved = prediction.reshape(*noisy.shape[:2], dit.config.patch.volume, 2, -1)
        return jnp.swapaxes(interleaved, 2, 3).reshape(*noisy.shape[:2], -1), state

    return denoise
