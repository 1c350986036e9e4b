"""Token routing (TREAD, arXiv 2501.04765) around the blocks in the middle, as a file of another package."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from dit_video.core.registry import register
from dit_video.models.backbones.dit import DiT, DiTConfig
from dit_video.models.conditioning import TrainingKeys
from dit_video.nn import ONE_DEVICE
from dit_video.tokens import take_tokens


class Routed:
    """A backbone that passes a share of the clips' tokens around all blocks but the first and the last, in training."""

    kept_share = 0.5

    def __call__(self, noisy, time, layout, conditioning, state=None):
        if (keys := conditioning.get(TrainingKeys)) is None:
            return super().__call__(noisy, time, layout, conditioning, state)
        x, inputs = self.embed_inputs(noisy, time, layout, conditioning)
        kept = draw_kept(keys.rows, noisy.shape[1], x.shape[1], share=self.kept_share)
        x, _ = self.apply_blocks(x, inputs, layers=slice(0, 1))
        part, _ = self.apply_blocks(take_tokens(x, kept), inputs.take(kept), layers=slice(1, -1))
        x = x.at[jnp.arange(len(x))[:, None], kept].set(part)
        x, _ = self.apply_blocks(x, inputs, layers=slice(-1, None))
        return self.apply_head(x[:, : noisy.shape[1]], inputs), state


def draw_kept(keys, tokens, total, *, share):
    """Return the numbers of random tokens of the clips, and of all tokens that follow them."""
    order = jax.vmap(lambda key: jax.random.permutation(key, tokens))(keys)
    others = jnp.broadcast_to(jnp.arange(tokens, total), (len(keys), total - tokens))
    return jnp.concatenate([jnp.sort(order[:, : round(share * tokens)], axis=1), others], axis=1)


@register
@dataclass(frozen=True, kw_only=True)
class RoutedConfig(DiTConfig):
    draws_in_training: ClassVar[bool] = True

    def make(self, rngs, partitioner=ONE_DEVICE):
        return RoutedDiT(self, partitioner=partitioner, rngs=rngs)


class RoutedDiT(Routed, DiT):
    pass
