"""Where a denoiser's tokens look."""

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
from dit_video.nn.attention import Pattern, Recorded


def attention_maps(
    dit: Dit | WanDit,
    noisy: Float[Array, "B N p"],
    time: Float[Array, "B G"],
    *,
    queries: Sequence[int],
    segments: Int[Array, "B N"],
    coordinates: Float[Array, "B N 3"],
    context: Float[Array, "B S E"] | None,
    context_segments: Int[Array, "B S"] | None,
    given: Given = Given(),
) -> Float32[np.ndarray, "L B K Q M"]:
    """The self-attention weights of some tokens in every layer, in the order in which the layers run.

    Keys (M) are the row's tokens, then registers and a joint context where the model has them. The model computes as it
    always does: whatever its backend, the weights are computed once more beside it, so that memory grows with the
    number of queries alone.

    Args:
      dit: the model.
      noisy: its input, as are `time`, `segments`, `coordinates`, `context`, `context_segments` and `given`.
      time: diffusion time, one value per segment.
      queries: numbers of the tokens (Q) that look.
      segments: of each token.
      coordinates: of each token.
      context: of each row.
      context_segments: of each token of the context.
      given: what else the model is given.

    Raises:
      UserError: no queries, or a number that no token of a row has.
    """
    if not queries or not all(0 <= number < noisy.shape[1] for number in queries):
        raise UserError(f"queries {list(queries)} must name tokens of a row, which are 0 to {noisy.shape[1] - 1}")
    found: list[Float32[np.ndarray, "B K Q M"]] = []
    watched = nnx.merge(*nnx.split(dit))  # with the same parameters; `dit` stays as it is

    def recorded(pattern: Pattern) -> Recorded:
        return Recorded(attention=dit.attention(pattern), pattern=pattern, queries=tuple(queries), record=found.append)

    watched.attention = recorded
    row: dict[str, Any] = {"context": context, "context_segments": context_segments}
    predicted = watched(
        noisy, time, segments=jnp.asarray(segments), coordinates=jnp.asarray(coordinates), given=given, **row
    )
    jax.block_until_ready(predicted)
    jax.effects_barrier()
    return np.stack(found)
