"""A cache of features (FORA, arXiv 2407.01425): most blocks are computed every few steps; another package's file."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dit_video.core.registry import register
from dit_video.models.backbones.dit import DiT, DiTConfig
from dit_video.nn import ONE_DEVICE


class CachedFeatures(NamedTuple):
    residual: Any
    """What the blocks added to the clips' tokens when they were last computed, `B N D`."""
    age: Any
    """Number of steps since then, `B`."""


class Cached:
    """A backbone that computes its first block in each step, and the others every few steps.

    In between it adds what the others added last (the residual, as in Δ-DiT, arXiv 2406.01125).
    """

    def __call__(self, noisy, time, layout, conditioning, state=None):
        if state is None:
            return super().__call__(noisy, time, layout, conditioning)
        conditioning.check(self.config.conditioning_kinds)
        count, every = noisy.shape[1], self.config.every
        x, inputs = self.embed_inputs(noisy, time, layout, conditioning)
        x, _ = self.apply_blocks(x, inputs, layers=slice(0, 1))
        first = x[:, :count]

        def compute():
            last = self.apply_blocks(x, inputs, layers=slice(1, None))[0][:, :count]
            return last, CachedFeatures(last - first, jnp.ones_like(state.age))

        def reuse():
            return first + state.residual, CachedFeatures(state.residual, state.age + 1)

        # Rows of one program are computed together.
        last, next_state = jax.lax.cond((state.age >= every).any(axis=0), compute, reuse)
        return self.apply_head(last, inputs), next_state


@register
@dataclass(frozen=True, kw_only=True)
class CachedConfig(DiTConfig):
    every: int = 2
    """Number of steps in which the blocks are computed once."""

    def make(self, rngs, partitioner=ONE_DEVICE):
        return CachedDiT(self, partitioner=partitioner, rngs=rngs)

    def init_sampling_state(self, rows):
        residual = jnp.zeros((*rows.tokens.shape[:2], self.width))
        return CachedFeatures(residual, jnp.full(len(residual), self.every))


class CachedDiT(Cached, DiT):
    pass


def add_cache(pipe, every=2):
    """Return a pipeline with the same weights and a cache."""
    backbone = CachedConfig(**vars(pipe.config.model.backbone), every=every)
    return pipe.replace(config=pipe.config.replace_model(backbone=backbone))
