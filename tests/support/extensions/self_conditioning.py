"""Self-conditioning (Analog Bits, arXiv 2208.04202): the last estimate of the data is an input, in another package."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from dit_video.core.registry import register
from dit_video.models.backbones.dit import DiT, DiTConfig
from dit_video.models.conditioning import TrainingKeys
from dit_video.nn import ONE_DEVICE, Linear


@register
@dataclass(frozen=True, kw_only=True)
class SelfConditionedConfig(DiTConfig):
    """A model of velocities of rectified flow."""

    draws_in_training: ClassVar[bool] = True

    def make(self, rngs, partitioner=ONE_DEVICE):
        return SelfConditionedDiT(self, partitioner=partitioner, rngs=rngs)

    def init_sampling_state(self, rows):
        return jnp.zeros_like(rows.tokens)


class SelfConditionedDiT(DiT):
    """Its state is the estimate of the data; in training, it is estimated for half of the rows, and else zero."""

    def __init__(self, config, *, partitioner=ONE_DEVICE, rngs):
        super().__init__(config, partitioner=partitioner, rngs=rngs)
        options = {"partitioner": partitioner, "rngs": rngs}
        self.embed_estimate = Linear(config.token_width, config.width, bias=False, **options)

    def __call__(self, noisy, time, layout, conditioning, state=None):
        def predict(estimate):
            both = jnp.concatenate([noisy, estimate], axis=-1)
            return super(SelfConditionedDiT, self).__call__(both, time, layout, conditioning)[0]

        def estimate_data(prediction):
            return noisy - layout.expand(time)[..., None] * prediction

        if state is not None:
            prediction = predict(state)
            return prediction, estimate_data(prediction)
        estimate = jnp.zeros_like(noisy)
        if (keys := conditioning.get(TrainingKeys)) is not None:
            own = jax.lax.stop_gradient(estimate_data(predict(estimate)))
            estimate = jnp.where(jax.vmap(jax.random.bernoulli)(keys.rows)[:, None, None], own, estimate)
        return predict(estimate), None

    def embed_tokens(self, noisy, layout, conditioning):
        """Return the embedded tokens; those with an estimate have it behind their own values."""
        noisy, estimate = jnp.split(noisy, [self.config.token_width], axis=-1)
        x = super().embed_tokens(noisy, layout, conditioning)
        return x + self.embed_estimate(estimate) if estimate.size else x
