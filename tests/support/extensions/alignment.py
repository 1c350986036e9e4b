"""Alignment of features with those of the clean clip (REPA, arXiv 2410.06940), as a file of another package."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dit_video.core.registry import register
from dit_video.nn import Linear
from dit_video.training.losses.auxiliary import AuxiliaryLoss


@register
@dataclass(frozen=True, kw_only=True)
class Alignment(AuxiliaryLoss):
    """One minus the cosine of projected tokens behind a block and of features of the clean clip, here random ones."""

    name: str = "alignment"
    weight: float = 0.5
    blocks: tuple[int, ...] = (0,)
    features: int = 8

    def make_head(self, backbone, *, partitioner, rngs):
        return Projector(backbone.width, self.features, partitioner=partitioner, rngs=rngs)

    def compute(self, head, inputs):
        (tokens,) = inputs.features.values()
        rows = inputs.rows
        projected, target = normalize(head(tokens)), normalize(encode(rows.tokens, self.features))
        return rows.layout.mean(1 - (projected * target).sum(axis=-1))


class Projector(nnx.Module):
    """An MLP from the model's tokens to the features."""

    def __init__(self, width, features, *, partitioner, rngs):
        self.hidden = Linear(width, width, partitioner=partitioner, rngs=rngs)
        self.out = Linear(width, features, partitioner=partitioner, rngs=rngs)

    def __call__(self, tokens):
        return self.out(nnx.silu(self.hidden(tokens)))


def encode(clean, features):
    """Return the features of clean tokens: a fixed encoder, in the place of a large pretrained one."""
    kernel = np.random.default_rng(0).standard_normal((clean.shape[-1], features))
    return jnp.tanh(clean @ kernel.astype(np.float32))


def normalize(x):
    return x * jax.lax.rsqrt(jnp.square(x).sum(axis=-1, keepdims=True) + 1e-6)
