"""Training adapters: what is trained, averaged and saved are their factors; the model is a constant."""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Array, Float, PyTree

from dit_video.nn import attach_lora, scaled
from dit_video.training.step import Figures, Loss, WeighedLoss


@dataclass(frozen=True, kw_only=True)
class LoraLoss:
    """A loss of a model with an adapter, `loss(factors, batch, step, ..., model's parameters)`.

    Gradients are of the factors alone: neither gradients nor moments of the model's kernels are ever made.
    """

    loss: Loss
    """of the model's parameters"""
    scale: float
    """of the adapter: alpha / rank"""

    def __call__(
        self, factors: PyTree, batch: PyTree, step: Array, *constants: PyTree
    ) -> tuple[Float[Array, ""], Figures]:
        *others, params = constants
        return self.loss(attach_lora(params, scaled(factors, self.scale)), batch, step, *others)

    def weight(self, batch: PyTree) -> Float[Array, ""]:
        """Of the loss."""
        loss: Any = self.loss
        if not isinstance(loss, WeighedLoss):
            raise TypeError(f"{type(loss).__name__} doesn't say what the parts of a batch weigh")
        return loss.weight(batch)
