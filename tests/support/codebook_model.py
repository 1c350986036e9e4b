"""The smallest model with a codebook, and its loss."""

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from dit_video.models.autoencoders import AutoencoderObjective, CodebookConfig, CodebookLearning, CodebookLoss
from dit_video.models.autoencoders.codebook import Codebook
from dit_video.nn import Linear, get_graph_def, init_params
from dit_video.scenes import shapes
from dit_video.tokens import Grid
from dit_video.training.losses.autoencoder import AutoencoderLoss
from dit_video.training.optim.optimizer import AdamW
from dit_video.training.optim.schedules import Constant

CODEBOOK = CodebookConfig(codes=16, width=4)
CLIPS = np.stack([shapes.render_example(index, seed=0, sizes=(Grid(1, 16, 16),)).frames for index in range(8)])
AVERAGES = CodebookLearning(decay=0.95, restart_after=10)
"""Codes that are averages of their latents."""
OPTIMIZER = AdamW(learning_rate=3e-3, schedule=Constant(warmup=5)).make(steps=80)


class Patches(nnx.Module):
    """The smallest model with a codebook, so that no network needs to be compiled."""

    def __init__(self, rngs: nnx.Rngs):
        self.to_codes, self.from_codes = Linear(48, 4, rngs=rngs), Linear(4, 48, rngs=rngs)
        self.codebook = Codebook(CODEBOOK, rngs=rngs)

    def quantize(self, pixels: jnp.ndarray):
        return self.codebook(self.to_codes(rearrange(pixels, "B t (h a) (w b) C -> B t h w (a b C)", a=4, b=4)))

    def reconstruct(self, codes: jnp.ndarray):
        return rearrange(self.from_codes(codes), "B t h w (a b C) -> B t (h a) (w b) C", a=4, b=4)


def make_loss(learning: CodebookLearning, make=Patches) -> AutoencoderLoss:
    """Return the loss of a model."""
    latents = CodebookLoss(learning=learning)
    return AutoencoderLoss(graph=get_graph_def(make), objective=AutoencoderObjective.pixels(), latents=latents, seed=3)


def init(key, make=Patches):
    """Return parameters whose codebook is far from all latents, with one code nearest to all."""
    params = init_params(make, key)
    return params | {"codebook": {"codes": params["codebook"]["codes"] + 40}}
