"""A small network beside a frozen one (ladder side-tuning, arXiv 2206.06522), as a file of another package."""

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx

from dit_video.core.registry import register
from dit_video.models.backbones.dit import DiT, DiTConfig
from dit_video.nn import ONE_DEVICE, Linear, make_stack


@register
@dataclass(frozen=True, kw_only=True)
class SideConfig(DiTConfig):
    side_width: int = 8

    def make(self, rngs, partitioner=ONE_DEVICE):
        return SideDit(self, partitioner=partitioner, rngs=rngs)


class Rung(nnx.Module):
    """A step of the ladder: it mixes what is there with the output of a block."""

    def __init__(self, config, partitioner, rngs):
        self.down = Linear(config.width, config.side_width, partitioner=partitioner, rngs=rngs)
        self.out = Linear(config.side_width, config.side_width, partitioner=partitioner, rngs=rngs)

    def __call__(self, side, x):
        return side + nnx.silu(self.out(side + self.down(x)))


class SideDit(DiT):
    """The side network adds to the input of the head; it starts with adding nothing."""

    def __init__(self, config, *, partitioner=ONE_DEVICE, rngs):
        super().__init__(config, partitioner=partitioner, rngs=rngs)
        self.side_rungs = make_stack(lambda r: Rung(config, partitioner, r), config.layers, rngs=rngs)
        self.side_up = Linear(config.side_width, config.width, init="zero", partitioner=partitioner, rngs=rngs)

    def __call__(self, noisy, time, layout, conditioning, state=None):
        conditioning.check(self.config.conditioning_kinds)
        x, inputs = self.embed_inputs(noisy, time, layout, conditioning)
        graph, rungs = nnx.split(self.side_rungs)

        def climb(block, carry, inputs, attention, rung):
            x, side = carry
            x = block(x, inputs, attention)
            return (x, nnx.merge(graph, rung)(side, x)), None

        side = jnp.zeros((*x.shape[:2], self.config.side_width))
        (x, side), _ = self.apply_blocks((x, side), inputs, wrapper=climb, values=rungs)
        return self.apply_head((x + self.side_up(side))[:, : noisy.shape[1]], inputs), state
