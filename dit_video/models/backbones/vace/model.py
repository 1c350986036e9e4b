"""VACE's transformer (arXiv 2503.07598, section 3.3) over packed rows: Wan's with a stack of control layers.

The control layers are blocks of Wan's kind over the embedded control, each of which starts from the one before. A
linear map of each, its hint, is added to the tokens after a block of the main stack. Control layer and main blocks take
turns, so that no more than one hint is in memory.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dit_video.core.errors import UserError
from dit_video.models.backbones.protocol import ClipTokens, count_tokens
from dit_video.models.backbones.times import ClipTimes
from dit_video.models.backbones.vace.control import ControlLatents, VaceControl
from dit_video.models.backbones.wan.model import WanBlock, WanDit, WanDitConfig, WanInputs
from dit_video.models.conditioning import ClipConditioning, Conditioning
from dit_video.nn import ONE_DEVICE, LayerGroup, LayerWrapper, Linear, Parallelism, make_stack, scan_layers
from dit_video.tokens import PackedRows


@dataclass(frozen=True, kw_only=True)
class VaceDitConfig(WanDitConfig):
    """Configuration of VACE's transformer; the defaults are those of VACE 1.3B.

    Raises:
      UserError: a conditioning other than one `VaceControl`, of whose layers the number does not divide that of the
        blocks, several attention patterns, or what `WanDitConfig` refuses.
    """

    conditioning: tuple[ClipConditioning, ...] = (VaceControl(),)

    def __post_init__(self):
        super().__post_init__()
        if [type(each) for each in self.conditioning] != [VaceControl]:
            names = ", ".join(type(each).__name__ for each in self.conditioning) or "none"
            raise UserError(f"conditioning ({names}) is invalid: the model reads one VaceControl. Use (VaceControl(),)")
        if self.layers % self.control.layers:
            rule = f"the hints of {self.control.layers} control layers must be evenly spaced"
            raise UserError(f"layers={self.layers} is invalid: {rule}. Use VaceControl(layers=...) that divides it")
        if len(self.patterns) > 1:
            raise UserError(f"pattern={self.pattern} is invalid: control layers need one for all layers. Use one")

    @property
    def control(self) -> VaceControl:
        """Return the config of the control."""
        control = self.conditioning[0]
        assert isinstance(control, VaceControl)
        return control

    @property
    def hint_layers(self) -> tuple[int, ...]:
        """Return the numbers of the blocks after which hints are added."""
        return tuple(range(0, self.layers, self.layers // self.control.layers))

    @property
    def control_width(self) -> int:
        """Return the number of values of a token's control (q)."""
        return self.patch.volume * self.control.channels

    @property
    def block_count(self) -> int:
        return self.layers + self.control.layers

    def count_multiplications(self, clip: ClipTokens, *, text: int, image: int) -> int:
        hints = (1 + self.control.layers) * self.width**2  # with the map before the first control layer
        own = count_tokens(clip) * (self.control_width * self.width + hints)
        return super().count_multiplications(clip, text=text, image=image) + own

    def make(self, rngs: nnx.Rngs, parallel: Parallelism = ONE_DEVICE) -> "VaceDit":
        return VaceDit(self, parallel=parallel, rngs=rngs)

    @classmethod
    def vace_1_3b(cls, **fields: Any) -> "VaceDitConfig":
        """Return the config of VACE 1.3B."""
        return cls(**fields)

    @classmethod
    def vace_14b(cls, **fields: Any) -> "VaceDitConfig":
        """Return the config of VACE 14B."""
        sizes = {"width": 5120, "mlp_dim": 13824, "layers": 40, "heads": 40}
        return cls(**{**sizes, "conditioning": (VaceControl(layers=8),), **fields})


class ControlInputs(NamedTuple):
    """Inputs of the control layers besides those of all blocks."""

    state: Float[Array, "B N D"]
    """Input of the first control layer."""
    strengths: Float[Array, "J B G"]
    """Factors of the hints."""


class VaceDit(WanDit):
    """VACE's transformer on packed rows, see `BlockBackbone`."""

    def __init__(self, config: VaceDitConfig, *, parallel: Parallelism = ONE_DEVICE, rngs: nnx.Rngs):
        super().__init__(config, parallel=parallel, rngs=rngs)
        self.control = ControlStack(config, parallel=parallel, rngs=rngs)

    def embed_inputs(
        self,
        noisy: Float[Array, "B N p"],
        time: Float[Array, "B _"] | ClipTimes,
        layout: PackedRows,
        conditioning: Conditioning,
    ) -> tuple[Float[Array, "B N D"], WanInputs]:
        """Return the embedded tokens, and the blocks' other inputs, with those of the control layers."""
        x, inputs = super().embed_inputs(noisy, time, layout, conditioning)
        control = conditioning[ControlLatents]
        state = x + self.control.input(self.control.embed(control.values)).astype(jnp.float32)
        return x, inputs._replace(control=ControlInputs(state, jnp.moveaxis(control.strengths, -1, 0)))

    def apply_blocks(
        self, x: Float[Array, "B N D"], inputs: WanInputs, *, wrapper: LayerWrapper | None = None, values: Any = None
    ) -> tuple[Float[Array, "B N D"], Any]:
        """Apply all blocks; see `BlockBackbone`. Control layers are not wrapped."""
        config, control = self.config, inputs.control
        attention = self.parallel.make_attention(config.attention, config.patterns[0])

        def call_control(layer, carry, inputs, attention, strength):
            x, state, _ = carry
            state = layer(state, inputs, attention)
            return (x, state, inputs.layout.expand(strength)[..., None] * layer.make_hint(state)), None

        def call_block(block, carry, inputs, attention, has_hint, values):
            x, state, hint = carry
            call = (lambda *args: (block(*args[:-1]), None)) if wrapper is None else functools.partial(wrapper, block)
            x, output = call(x, inputs, attention, values)
            return (x + hint if has_hint else x, state, hint), output

        spacing = config.layers // len(control.strengths)
        groups = [
            LayerGroup(self.control.blocks, [(inputs, attention)], call_control, control.strengths),
            LayerGroup(self.blocks, [(inputs, attention, index == 0) for index in range(spacing)], call_block, values),
        ]
        carry, (_, outputs) = scan_layers((x, control.state, jnp.zeros_like(x)), groups, remat=config.remat)
        return carry[0], outputs


class ControlStack(nnx.Module):
    """The control layers, with the maps to the input of the first one."""

    def __init__(self, config: VaceDitConfig, *, parallel: Parallelism, rngs: nnx.Rngs):
        linear = functools.partial(Linear, dtype=jnp.dtype(config.dtype), parallel=parallel, rngs=rngs)
        self.embed = linear(config.control_width, config.width)
        self.input = linear(config.width, config.width, init="zero")
        make_layer = functools.partial(ControlLayer, config, parallel=parallel)
        self.blocks = make_stack(lambda r: make_layer(rngs=r), config.control.layers, rngs=rngs)


class ControlLayer(WanBlock):
    """A block of Wan with a hint for the main stack."""

    def __init__(self, config: WanDitConfig, *, parallel: Parallelism, rngs: nnx.Rngs):
        super().__init__(config, parallel=parallel, rngs=rngs)
        dtype = jnp.dtype(config.dtype)
        # Zero weights, so that a trained model that is extended by control predicts as before.
        self.hint = Linear(config.width, config.width, init="zero", dtype=dtype, parallel=parallel, rngs=rngs)

    def make_hint(self, state: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        """Return the hint of the layer's output."""
        return self.hint(state).astype(jnp.float32)
