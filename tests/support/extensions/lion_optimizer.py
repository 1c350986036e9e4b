"""An optimizer as a file of another package: Lion (arXiv 2302.06675), of optax."""

from dataclasses import dataclass

import optax

from dit_video.core.registry import register
from dit_video.training.optim.optimizer import OptimizerConfig


@register
@dataclass(frozen=True, kw_only=True)
class Lion(OptimizerConfig):
    """Updates of the size of the learning rate, by the signs of momentum."""

    b1: float = 0.9
    b2: float = 0.99

    def make_main(self, rates, *, mesh):
        return optax.chain(optax.scale_by_lion(self.b1, self.b2), *self.decay_and_scale(rates))
