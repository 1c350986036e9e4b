"""A U-Net of another package: one convolution at full and one at half resolution, on canvases and dense batches."""

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx

from dit_video.core.registry import register
from dit_video.models.backbones.protocol import BackboneConfig
from dit_video.models.conditioning import TextTokens
from dit_video.nn import ONE_DEVICE, CausalConv, Linear, sinusoidal_embedding
from dit_video.tokens import Canvas, DenseBatch, Grid

HALF = Grid(1, 2, 2)


@register
@dataclass(frozen=True, kw_only=True)
class SmallUnetConfig(BackboneConfig):
    channels: int
    context_width: int
    patch: Grid = Grid(1, 1, 1)
    width: int = 8
    layers: int = 2
    layouts = (Canvas, DenseBatch)
    size_multiple = HALF
    canvas_padding = Grid(2, 2, 2)  # three frames of a causal convolution

    def make(self, rngs, partitioner=ONE_DEVICE):
        return SmallUnet(self, rngs=rngs)


class SmallUnet(nnx.Module):
    """A clip's features are scaled by its time and its text; the resolutions are summed."""

    def __init__(self, config, *, rngs):
        self.config = config
        self.fine = CausalConv(config.channels, config.width, (3, 3, 3), temporal_padding="zero", rngs=rngs)
        self.coarse = CausalConv(config.width, config.width, (1, 3, 3), rngs=rngs)
        self.condition = Linear(16 + config.context_width, config.width, rngs=rngs)
        self.head = CausalConv(config.width, config.channels, (1, 3, 3), rngs=rngs)

    def __call__(self, noisy, time, layout, conditioning, state=None):
        conditioning.check(self.config.conditioning_kinds)
        text = conditioning[TextTokens].mean(layout.count)
        condition = self.condition(jnp.concatenate([sinusoidal_embedding(time, 16), text], axis=-1))
        x = self.fine(layout.mask_padding(layout.to_array(noisy)))
        x = layout.mask_padding(nnx.silu(x * (1 + layout.to_array(layout.expand(condition)))))
        half = layout.coarsen(HALF)
        y = half.mask_padding(nnx.silu(self.coarse(x[:, :, ::2, ::2])))
        x = layout.mask_padding(x + jnp.repeat(jnp.repeat(y, 2, axis=2), 2, axis=3))
        return layout.from_array(self.head(x)), state
