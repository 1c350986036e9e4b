"""Training of LoRA adapters: their factors are trained, averaged and saved, and the model is a constant."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Array, PyTree

from dit_video.nn import add_lora_scale, attach_lora
from dit_video.training.step import Loss, LossOutput


def attach_factors(params: Mapping[str, Any], factors: Mapping[str, Any], scale: float) -> dict[str, Any]:
    """Return parameters with the trained factors of an adapter attached; `scale` is alpha / rank."""
    return attach_lora(params, add_lora_scale(factors, scale))


@dataclass(frozen=True, kw_only=True)
class LoraLoss:
    """A loss of a model with a LoRA adapter, `loss(factors, batch, step, ..., model's parameters)`.

    It is differentiated in the factors only: neither gradients nor optimizer moments of the model's kernels exist.
    """

    loss: Loss
    """Loss as a function of the model's parameters."""
    scale: float
    """Scale of the adapter, alpha / rank."""

    def __call__(self, factors: PyTree, batch: PyTree, step: Array, *constants: PyTree) -> LossOutput:
        *others, params = constants
        return LossOutput.from_pair(*self.loss(attach_factors(params, factors, self.scale), batch, step, *others))
