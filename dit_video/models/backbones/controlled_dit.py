"""DiT with a control stack over packed rows (ControlNet, arXiv 2302.05543; for transformers arXiv 2401.05252, 3.3).

The stack has copies of the first blocks, over the tokens with the embedded control added. The hint of each copy, a
linear map of its output, is added to the output of its block. These maps and the embedding start at zero, so that a
trained model's predictions do not change until the stack is trained. `conversion.grow` makes one of a `DiT`; to train
the stack alone, the optimizer has `trainable=("control",)`.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dit_video.core.errors import UserError
from dit_video.models.backbones.blocks import Block, DiTInputs, TokenConditions
from dit_video.models.backbones.dit import DiT, DiTConfig
from dit_video.models.backbones.protocol import ClipTimes, ClipTokens, count_tokens
from dit_video.models.conditioning import ClipConditioning, Conditioning, Control, ControlClip
from dit_video.nn import ONE_DEVICE, LayerGroup, LayerWrapper, Linear, Partitioner, make_stack, scan_layers
from dit_video.nn.attention import Attention
from dit_video.tokens import PackedRows, take_tokens


@dataclass(frozen=True, kw_only=True)
class ControlledDiTConfig(DiTConfig):
    """Configuration of the controlled diffusion transformer; all other fields are as in `DiTConfig`.

    Raises:
      UserError: If the conditioning has not one `ControlClip`, the stack is longer than the model, or layers have
        several attention patterns.
    """

    conditioning: tuple[ClipConditioning, ...] = (ControlClip(),)
    control_layers: int = 2
    """Number of the stack's blocks, copies of the model's first ones."""

    def __post_init__(self):
        super().__post_init__()
        if sum(isinstance(each, ControlClip) for each in self.conditioning) != 1:
            names = ", ".join(type(each).__name__ for each in self.conditioning) or "none"
            raise UserError(f"conditioning ({names}) is invalid: the stack reads one ControlClip. Use (ControlClip(),)")
        if not 1 <= self.control_layers <= self.layers:
            rule = f"the stack has copies of some of the {self.layers} blocks"
            raise UserError(f"control_layers={self.control_layers} is invalid: {rule}. Use 1 to {self.layers}")
        if len(self.patterns) > 1:
            raise UserError(f"pattern={self.pattern} is invalid: a control stack needs one for all layers. Use one")

    @property
    def block_count(self) -> int:
        return self.layers + self.control_layers

    def check_cache(self) -> None:
        raise UserError("a cache is invalid for ControlledDiT: its stack keeps no keys. Use DiT.")

    def count_multiplications(self, clip: ClipTokens, *, text: int, image: int) -> int:
        tokens = count_tokens(clip) + self.extra_tokens
        own = self.control_layers * tokens * self.width**2
        if self.has_cross_attention:
            own += self.control_layers * 2 * self.width**2 * (tokens + text)
        return super().count_multiplications(clip, text=text, image=image) + own

    def make(self, rngs: nnx.Rngs, partitioner: Partitioner = ONE_DEVICE) -> "ControlledDiT":
        return ControlledDiT(self, partitioner=partitioner, rngs=rngs)


class ControlledInputs(NamedTuple):
    """Inputs of the model's blocks."""

    blocks: DiTInputs
    hints: Float[Array, "K B T D"]
    """What the stack adds to the outputs of the first blocks."""

    @property
    def condition(self) -> TokenConditions:
        """Return the conditions from which the head projects its modulation."""
        return self.blocks.condition

    def take(self, kept: Int[Array, "B K"]) -> "ControlledInputs":
        """Return the inputs of some of the tokens; see `TransformerInputs`."""
        return ControlledInputs(self.blocks.take(kept), jax.vmap(lambda each: take_tokens(each, kept))(self.hints))


class ControlBlock(Block):
    """A block of the stack, with a hint for the model's block that it is a copy of."""

    def __init__(self, config: ControlledDiTConfig, *, partitioner: Partitioner, rngs: nnx.Rngs):
        super().__init__(config, partitioner=partitioner, rngs=rngs)
        dtype = jnp.dtype(config.dtype)
        self.hint = Linear(config.width, config.width, init="zero", dtype=dtype, partitioner=partitioner, rngs=rngs)

    def make_hint(self, state: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Return the hint of the block's output."""
        return self.hint(state).astype(jnp.float32)


class ControlledDiT(DiT):
    """The controlled diffusion transformer on packed rows; see `BlockBackbone`."""

    config: ControlledDiTConfig
    cond_control: nnx.Module
    """Embedding of the control."""

    def __init__(self, config: ControlledDiTConfig, *, partitioner: Partitioner = ONE_DEVICE, rngs: nnx.Rngs):
        super().__init__(config, partitioner=partitioner, rngs=rngs)
        make_block = functools.partial(ControlBlock, config, partitioner=partitioner)
        self.control = nnx.Dict(blocks=make_stack(lambda r: make_block(rngs=r), config.control_layers, rngs=rngs))

    @property
    def added_conditioning(self) -> tuple[ClipConditioning, ...]:
        return tuple(each for each in self.config.conditioning if not isinstance(each, ControlClip))

    def embed_inputs(
        self,
        noisy: Float[Array, "B N p"],
        time: Float[Array, "B _"] | ClipTimes,
        layout: PackedRows,
        conditioning: Conditioning,
    ) -> tuple[Float[Array, "B T D"], ControlledInputs]:
        """Return the embedded tokens, and the blocks' other inputs, including what the stack adds."""
        config = self.config
        x, inputs = super().embed_inputs(noisy, time, layout, conditioning)
        control, length = conditioning[Control], noisy.shape[1]
        assert control.strength is not None  # which `ControlClip.prepare` sets

        def call_copy(block, state, inputs, attention, _):
            state = block(state, inputs, attention)
            return state, block.make_hint(state)

        state = x.at[:, :length].add(self.cond_control(control.values).astype(jnp.float32))
        copies = LayerGroup(self.control.blocks, [(inputs, self._make_attention())], call_copy)
        _, (hints,) = scan_layers(state, [copies], remat=config.remat)
        strength = jnp.pad(layout.expand(control.strength), ((0, 0), (0, x.shape[1] - length)))
        return x, ControlledInputs(inputs, strength[..., None] * hints)

    def apply_blocks(
        self,
        x: Float[Array, "B T D"],
        inputs: ControlledInputs,
        *,
        layers: slice = slice(None),
        wrapper: LayerWrapper | None = None,
        values: Any = None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Apply all blocks, or a range of them, with the stack's hints; see `BlockBackbone`."""
        config, hints = self.config, inputs.hints

        def call_block(block, x, inputs, attention, own):
            number, values = own
            if wrapper is None:
                x, output = block(x, inputs, attention), None
            else:
                x, output = wrapper(block, x, inputs, attention, values)
            hint = hints[jnp.minimum(number, len(hints) - 1)]
            return x + jnp.where(number < len(hints), hint, 0), output

        numbers = jnp.arange(config.layers)[layers]
        group = LayerGroup(self.blocks, [(inputs.blocks, self._make_attention())], call_block, (numbers, values))
        x, (outputs,) = scan_layers(x, [group], layers=layers, remat=config.remat)
        return x, outputs

    def _make_attention(self) -> Attention:
        return self.partitioner.make_attention(self.config.attention, self.config.patterns[0])
