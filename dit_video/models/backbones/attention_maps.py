"""Attention maps: the self-attention weights of a denoiser's layers."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32

from dit_video.core.errors import UserError
from dit_video.models.backbones.protocol import Backbone
from dit_video.models.conditioning import Conditioning
from dit_video.nn import Backend, Partitioner
from dit_video.nn.attention import Attention, Full, Pattern, RecordedAttention
from dit_video.nn.attention.dense import WeightsCallback
from dit_video.tokens import PackedRows


@dataclass(frozen=True)
class _Recorder(Partitioner):
    """Self-attention that reports its weights."""

    queries: tuple[int, ...]
    record: WeightsCallback

    def make_attention(self, backend: Backend, pattern: Pattern = Full()) -> Attention:
        attention = super().make_attention(backend, pattern)
        return RecordedAttention(attention=attention, pattern=pattern, queries=self.queries, record=self.record)


def compute_attention_maps(
    backbone: Backbone,
    noisy: Float[Array, "B N p"],
    time: Float[Array, "B _"],
    layout: PackedRows,
    conditioning: Conditioning,
    *,
    queries: Sequence[int],
) -> Float32[np.ndarray, "L B K Q M"]:
    """Compute the self-attention weights of some tokens in every layer, in the order in which the layers run.

    Keys (M) are the row's tokens, then registers and the joint context if the model has them. The model runs with its
    usual backend; the weights are computed separately, so memory grows with the number of queries only.

    Args:
      backbone: Denoiser to inspect.
      noisy, time, layout, conditioning: Its inputs; see `Backbone`.
      queries: Indices in the row of the Q tokens whose weights are returned.

    Raises:
      UserError: If there are no queries, or an index is outside the row.
    """
    if not queries or not all(0 <= query < noisy.shape[1] for query in queries):
        raise UserError(f"queries={list(queries)} is invalid; give token indices from 0 to {noisy.shape[1] - 1}")
    weights: list[Float32[np.ndarray, "B K Q M"]] = []
    recorder = _Recorder(tuple(queries), weights.append)
    graph = nnx.graphdef(nnx.eval_shape(lambda: backbone.config.make(nnx.Rngs(0), recorder)))
    model = nnx.merge(graph, nnx.state(backbone))
    prediction, _ = model(noisy, time, layout, conditioning)
    jax.block_until_ready(prediction)
    jax.effects_barrier()  # the weights arrive by callbacks, which may run after the prediction
    return np.stack(weights)
