"""A model without some of its layers: its blocks are wrapped from outside, and its weights are not copied."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dit_video.core.errors import UserError
from dit_video.core.typing import AnyArray
from dit_video.models.backbones.protocol import Backbone, BackboneConfig, BlockBackbone, ClipTimes
from dit_video.models.conditioning import Conditioning
from dit_video.tokens import PackedRows


@dataclass(frozen=True)
class SkippedLayers:
    """A `Backbone` that passes tokens around some blocks of another one; skipped blocks cost nothing.

    The choice of blocks is a traced value, so one compiled program serves all choices.
    """

    backbone: BlockBackbone
    is_skipped: Bool[Array, " L"]

    @property
    def config(self) -> BackboneConfig:
        return self.backbone.config

    def __call__(
        self,
        noisy: Float[Array, "B N p"],
        time: Float[Array, "B _"] | ClipTimes,
        layout: PackedRows,
        conditioning: Conditioning,
        state: Any = None,
    ) -> tuple[Float[Array, "B N prediction"], Any]:
        """Predict from noisy tokens; see `Backbone`. The state is returned unchanged."""
        conditioning.check(self.config.conditioning_kinds)
        x, inputs = self.backbone.embed_inputs(noisy, time, layout, conditioning)
        x, _ = self.backbone.apply_blocks(x, inputs, wrapper=_apply_or_skip, values=self.is_skipped)
        return self.backbone.apply_head(x[:, : noisy.shape[1]], inputs), state


def skip_layers(backbone: Backbone, layers: Int[AnyArray, " k"]) -> SkippedLayers:
    """Return a model without the layers with these numbers.

    Raises:
      UserError: If the model is not made of equal blocks.
    """
    if not isinstance(backbone, BlockBackbone):
        rule = f"{type(backbone).__name__} is not made of equal blocks. Use skip_layers=None."
        raise UserError(f"skip_layers is invalid: {rule}")
    numbers = jnp.arange(backbone.config.layers)
    return SkippedLayers(backbone, (numbers[:, None] == jnp.asarray(layers)).any(axis=1))


def _apply_or_skip(
    block: Any, x: Array, inputs: Any, attention: Any, is_skipped: Bool[Array, ""]
) -> tuple[Array, None]:
    return jax.lax.cond(is_skipped, lambda: x, lambda: block(x, inputs, attention)), None
