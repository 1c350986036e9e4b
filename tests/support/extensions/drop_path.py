"""Stochastic depth (arXiv 1603.09382), as a file of another package."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from dit_video.core.registry import register
from dit_video.models.backbones.dit import DiT, DiTConfig
from dit_video.models.conditioning import TrainingKeys
from dit_video.nn import ONE_DEVICE


class DropPath:
    """A backbone that skips random blocks in training, the later the likelier."""

    last_rate = 0.5
    """Probability that the last block is skipped; that of the first is 0."""

    def __call__(self, noisy, time, layout, conditioning, state=None):
        if (keys := conditioning.get(TrainingKeys)) is None:
            return super().__call__(noisy, time, layout, conditioning, state)
        x, inputs = self.embed_inputs(noisy, time, layout, conditioning)
        rates = jnp.linspace(0, self.last_rate, self.config.layers)
        is_dropped = jax.random.uniform(keys.step, rates.shape) < rates
        x, _ = self.apply_blocks(x, inputs, wrapper=apply_or_skip, values=(is_dropped, rates))
        return self.apply_head(x[:, : noisy.shape[1]], inputs), state


def apply_or_skip(block, x, inputs, attention, values):
    is_dropped, rate = values
    return jax.lax.cond(is_dropped, lambda: x, lambda: x + (block(x, inputs, attention) - x) / (1 - rate)), None


@register
@dataclass(frozen=True, kw_only=True)
class DropPathConfig(DiTConfig):
    draws_in_training: ClassVar[bool] = True

    def make(self, rngs, partitioner=ONE_DEVICE):
        return DropPathDiT(self, partitioner=partitioner, rngs=rngs)


class DropPathDiT(DropPath, DiT):
    pass
