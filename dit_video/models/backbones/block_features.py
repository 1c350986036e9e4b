"""Features of a model: the tokens behind some of its blocks, which are called in ranges; weights are not copied."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from dit_video.core.errors import UserError
from dit_video.models.backbones.protocol import BackboneConfig, BlockBackbone, ClipTimes
from dit_video.models.conditioning import Conditioning
from dit_video.nn import NO_DEVICE
from dit_video.nn.container import ParamRngs
from dit_video.tokens import PackedRows


@dataclass(frozen=True)
class BlockFeatures:
    """A `Backbone` that returns the clips' tokens behind some blocks of another one, in the place of a next state."""

    backbone: BlockBackbone
    blocks: tuple[int, ...]
    """Numbers of the blocks, from 0, as `apply_blocks` numbers them."""

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
    ) -> tuple[Float[Array, "B N prediction"], dict[int, Float[Array, "B N D"]]]:
        """Predict from noisy tokens; see `Backbone`. Features are by number of the block; the state is not used."""
        conditioning.check(self.config.conditioning_kinds)
        x, inputs = self.backbone.embed_inputs(noisy, time, layout, conditioning)
        features, start = {}, 0
        for block in sorted(set(self.blocks)):
            x, _ = self.backbone.apply_blocks(x, inputs, layers=slice(start, block + 1))
            features[block], start = x[:, : noisy.shape[1]], block + 1
        x, _ = self.backbone.apply_blocks(x, inputs, layers=slice(start, None))
        return self.backbone.apply_head(x[:, : noisy.shape[1]], inputs), features


def check_blocks(config: BackboneConfig, blocks: Sequence[int]) -> None:
    """Check that `BlockFeatures` can return the tokens behind blocks of a model.

    Raises:
      UserError: If the model lacks one of the blocks, is not made of blocks, applies no range of them, or calls them in
        its own way in training.
    """
    name = type(config).__name__
    if unknown := [block for block in blocks if not 0 <= block < config.layers]:
        raise UserError(f"blocks={unknown} is invalid: {name} has {config.layers}. Use 0 to {config.layers - 1}.")
    model = nnx.eval_shape(lambda: config.make(ParamRngs(jax.random.key(0)), NO_DEVICE))
    rule = ""
    if not isinstance(model, BlockBackbone):
        rule = f"{name} is not made of equal blocks"
    elif not config.has_block_ranges:
        rule = f"{name} applies all blocks at once"
    elif config.draws_in_training:
        rule = f"{name} draws in training, and may pass tokens around blocks"
    if rule:
        raise UserError(f"blocks={list(blocks)} is invalid: {rule}. Use blocks=().")
