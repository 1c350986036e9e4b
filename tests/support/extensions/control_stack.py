"""A control stack (ControlNet, arXiv 2302.05543) around a transformer, as a file of another package."""

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dit_video.core.registry import register
from dit_video.models.backbones.dit import DiT, DiTConfig
from dit_video.models.conditioning import ClipConditioning
from dit_video.nn import ONE_DEVICE, LayerGroup, Linear, make_stack, scan_layers
from dit_video.tokens import Field


class Control(NamedTuple):
    values: Any
    strength: Any


@register
@dataclass(frozen=True, kw_only=True)
class Brightness(ClipConditioning):
    """Mean brightness of the pixels of every latent position."""

    record = Control
    field = Field(name="brightness", alignment="grid", shape=(1,))

    def from_clip(self, view):
        size, frames = view.latents, view.frames.mean(axis=-1) / 255
        frames = frames[np.linspace(0, len(frames) - 1, size.t).round().astype(int)]
        return self.from_request(frames.reshape(size.t, size.h, -1, size.w, 8).mean(axis=(2, 4)), size)

    def from_request(self, value, latents):
        return np.asarray(value, np.float32)[..., None]

    def prepare(self, values, layout, keys, strength):
        """Return the values with the factor of the residuals, 1 in training."""
        ones = jnp.ones((values.shape[0], layout.count))
        return Control(values, ones if strength is None else strength)


@register
@dataclass(frozen=True, kw_only=True)
class ControlledConfig(DiTConfig):
    conditioning: tuple[ClipConditioning, ...] = (Brightness(),)
    after: tuple[int, ...] = (0,)
    """Blocks after which a residual is added."""

    @property
    def base(self):
        return DiTConfig(
            **{name: getattr(self, name) for name in (field.name for field in dataclasses.fields(DiTConfig))}
            | {"conditioning": ()}
        )

    def make(self, rngs, partitioner=ONE_DEVICE):
        return ControlledDit(self, partitioner, rngs)


class ControlledDit(nnx.Module):
    def __init__(self, config, partitioner, rngs):
        self.config, count, width = config, len(config.after), config.width
        self.base = DiT(config.base, partitioner=partitioner, rngs=rngs)
        graph, blocks = nnx.split(self.base.blocks)
        self.copies = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[:count], blocks))
        self.hint = Linear(config.patch.volume, width, partitioner=partitioner, rngs=rngs)
        self.outputs = make_stack(
            lambda r: Linear(width, width, init="zero", partitioner=partitioner, rngs=r), count, rngs=rngs
        )

    def __call__(self, noisy, time, layout, conditioning, state=None):
        config, base = self.config, self.base
        conditioning.check(config.conditioning_kinds)
        x, inputs = base.embed_inputs(noisy, time, layout, conditioning)
        graph, outputs = nnx.split(self.outputs)

        def collect(block, x, inputs, attention, output):
            x = block(x, inputs, attention)
            return x, nnx.merge(graph, output)(x)

        hint = self.hint(conditioning[Control].values)
        contexts = [(inputs, base.partitioner.make_attention(config.attention))]
        group = LayerGroup(self.copies, contexts, collect, outputs)
        _, (residuals,) = scan_layers(x.at[:, : noisy.shape[1]].add(hint), [group], remat=config.remat)
        strength = jnp.pad(layout.expand(conditioning[Control].strength), ((0, 0), (0, x.shape[1] - noisy.shape[1])))

        def add_residual(block, x, inputs, attention, slot):
            x = block(x, inputs, attention)
            return x + jnp.where(slot < 0, 0, strength[..., None] * residuals[slot]), None

        slots = [config.after.index(layer) if layer in config.after else -1 for layer in range(config.layers)]
        x, _ = base.apply_blocks(x, inputs, wrapper=add_residual, values=jnp.asarray(slots))
        return base.apply_head(x[:, : noisy.shape[1]], inputs), state
