"""Attention maps: the self-attention weights of a denoiser's layers."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from dit_video.backbones.dit.conditioning import Given
from dit_video.backbones.dit.model import Dit
from dit_video.backbones.wan.model import WanDit
from dit_video.core.errors import UserError
from dit_video.nn.attention import Pattern, RecordedAttention


def compute_attention_maps(
    dit: Dit | WanDit,
    noisy: Float[Array, "B N p"],
    time: Float[Array, "B G"],
    *,
    queries: Sequence[int],
    segments: Int[Array, "B N"],
    positions: Float[Array, "B N 3"],
    context: Float[Array, "B S E"] | None,
    context_segments: Int[Array, "B S"] | None,
    given: Given = Given(),
) -> Float32[np.ndarray, "L B K Q M"]:
    """Compute the self-attention weights of some tokens in every layer, in the order in which the layers run.

    Keys (M) are the row's tokens, then registers and the joint context if the model has them. The model runs with its
    usual backend; the weights are computed separately, so memory grows with the number of queries only.

    Args:
      dit: denoiser to inspect.
      noisy: noisy tokens, its input.
      time: diffusion time, one value per segment.
      queries: indices in the row of the Q tokens whose weights are returned.
      segments: segment id of each token.
      positions: positions of each token.
      context: context tokens of each row.
      context_segments: segment id of each context token.
      given: further inputs of the model.

    Raises:
      UserError: no queries, or an index outside the row.
    """
    if not queries or not all(0 <= query < noisy.shape[1] for query in queries):
        raise UserError(f"queries={list(queries)} is invalid; give token indices from 0 to {noisy.shape[1] - 1}")
    weights: list[Float32[np.ndarray, "B K Q M"]] = []
    model = nnx.merge(*nnx.split(dit))  # a copy with the same parameters, so that `dit` is not changed

    def record_attention(pattern: Pattern) -> RecordedAttention:
        attention, indices = dit.attention(pattern), tuple(queries)
        return RecordedAttention(attention=attention, pattern=pattern, queries=indices, record=weights.append)

    model.attention = record_attention
    row: dict[str, Any] = {"segments": jnp.asarray(segments), "positions": jnp.asarray(positions)}
    row |= {"context": context, "context_segments": context_segments}
    prediction = model(noisy, time, given=given, **row)
    jax.block_until_ready(prediction)
    jax.effects_barrier()  # the weights arrive by callbacks, which may be later than the prediction
    return np.stack(weights)
