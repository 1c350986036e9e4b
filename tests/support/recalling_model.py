"""A model with a state in sampling: each of its predictions has a share of the last one."""

from dataclasses import dataclass

import jax.numpy as jnp

from dit_video.models.backbones.dit import DiT, DiTConfig
from dit_video.nn import ONE_DEVICE

RECALL = 0.5
"""Share of its last prediction that the model adds to its next one."""


@dataclass(frozen=True, kw_only=True)
class RecallingConfig(DiTConfig):
    """A model whose state is its last prediction, and the number of its calls."""

    def make(self, rngs, partitioner=ONE_DEVICE):
        return RecallingDiT(self, partitioner=partitioner, rngs=rngs)

    def init_sampling_state(self, rows):
        return {"last": jnp.zeros_like(rows.tokens), "calls": jnp.zeros(len(rows.tokens), jnp.int32)}


class RecallingDiT(DiT):
    def __call__(self, noisy, time, layout, conditioning, state=None):
        prediction, _ = super().__call__(noisy, time, layout, conditioning)
        if state is None:
            return prediction, None
        prediction = prediction + RECALL * state["last"]
        return prediction, {"last": prediction, "calls": state["calls"] + 1}
