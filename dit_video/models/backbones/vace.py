"""VACE's transformer (arXiv 2503.07598, section 3.3) over packed rows: Wan's with a stack of control layers.

The control layers are blocks of Wan's kind over the embedded control, and each continues from the one before. Each
layer's hint, a linear map of its output, is added to the tokens after a block of the main stack. Control layers and
main blocks take turns, so that no more than one hint is in memory.
"""

import functools
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int, Key, Shaped

from dit_video.core.errors import UserError, check_at_least
from dit_video.models.backbones.protocol import ClipTimes, ClipTokens, count_tokens
from dit_video.models.backbones.wan import WanBlock, WanDit, WanDitConfig, WanInputs
from dit_video.models.conditioning import ClipConditioning, ClipView, Conditioning
from dit_video.nn import ONE_DEVICE, LayerGroup, LayerWrapper, Linear, Partitioner, make_stack, scan_layers
from dit_video.tokens import Field, Grid, PackedRows, take_tokens

NAME = "control"
"""Name of the conditioning, whose strengths requests set."""


class ControlLatents(NamedTuple):
    """Control of the clips at their tokens, and the strengths of the control layers."""

    values: Float[Array, "B N q"]
    """Latents and masks, patchified like the noisy latents."""
    strengths: Float[Array, "B G J"]
    """Factors of the hints that the control layers add."""


@dataclass(frozen=True, kw_only=True)
class VaceControl(ClipConditioning):
    """Control latents of VACE. Training keeps the first frame of some clips, and generates everything else.

    `dropout` is the probability that a clip's first frame is not kept; it is then generated from its text alone, as an
    image always is.

    Raises:
      UserError: If there are no channels or no layers, or `dropout` is outside [0, 1).
    """

    latent_channels: int = 16
    """Number of channels of the autoencoder's latents."""
    mask_channels: int = 64
    """Number of channels of the mask: the pixels of a frame that a latent position covers."""
    layers: int = 15
    """Number of control layers, each with its own strength."""
    dropout: float = 0.5
    record = ControlLatents
    encoded_prefixes = (0, 1)

    def __post_init__(self):
        super().__post_init__()
        check_at_least(1, latent_channels=self.latent_channels, mask_channels=self.mask_channels, layers=self.layers)

    @property
    def channels(self) -> int:
        """Return the number of channels of both latents and the mask."""
        return 2 * self.latent_channels + self.mask_channels

    @property
    def field(self) -> Field:
        return Field(name=NAME, alignment="grid", shape=(self.channels,))

    @property
    def strength_shape(self) -> tuple[int, ...]:
        return (self.layers,)

    def from_clip(self, view: ClipView) -> Float32[np.ndarray, "t h w q"]:
        """Return the control of a clip whose first frame is kept, or of an image, which is generated.

        Raises:
          UserError: If the autoencoder's latents and stride make other numbers of channels.
        """
        is_generated = np.ones(view.frames.shape[:3], bool)
        kept = int(len(view.frames) > 1)
        is_generated[:kept] = False
        return self.concatenate(view.encoded[kept], view.encoded[0], is_generated)

    def from_request(self, value: Any, latents: Grid) -> np.ndarray:
        """Refuse the value: a request holds the clips and the mask from which the control is made.

        Raises:
          UserError: If it is called, as no value is valid.
        """
        rule, fix = "it is made of clips and a mask", "control=, video= with generated=, or reference_images="
        raise UserError(f"conditioning={{{NAME!r}: …}} is invalid: {rule}. Use {fix}")

    def prepare(
        self, values: Array, layout: PackedRows, keys: Key[Array, "B G"], strength: Float[Array, "B G J"] | None
    ) -> ControlLatents:
        """Return the record of a batch; in training the first frames of some clips are not kept."""
        values = jnp.asarray(values, jnp.float32)
        if strength is not None:
            return ControlLatents(values, strength)
        is_dropped = layout.expand(jax.vmap(jax.vmap(jax.random.uniform))(keys) < self.dropout)
        by_position = values.reshape(*values.shape[:2], -1, self.channels)
        reactive = by_position[..., self.latent_channels : 2 * self.latent_channels]
        # Nothing is kept: both clips are grey, and all pixels are generated.
        nothing = jnp.concatenate([reactive, reactive, jnp.ones_like(by_position[..., -self.mask_channels :])], axis=-1)
        kept = jnp.where(is_dropped[..., None], nothing.reshape(values.shape), values)
        return ControlLatents(kept, jnp.ones((len(values), layout.count, self.layers)))

    def concatenate(
        self,
        inactive: Float32[np.ndarray, "t h w c"],
        reactive: Float32[np.ndarray, "t h w c"],
        is_generated: Bool[np.ndarray, "T H W"],
    ) -> Float32[np.ndarray, "t h w q"]:
        """Return a clip's control from the latents of its two parts and the mask of its generated pixels.

        Raises:
          UserError: If the latents or the mask have other numbers of channels.
        """
        mask = fold_pixel_mask(is_generated, Grid(*inactive.shape[:3])).astype(np.float32)
        widths = (inactive.shape[-1], mask.shape[-1])
        if widths != (self.latent_channels, self.mask_channels):
            raise UserError(
                f"the denoiser reads control of {self.latent_channels} latent and {self.mask_channels} mask channels, "
                f"but this autoencoder makes {widths[0]} and {widths[1]}; use the one that it was trained with"
            )
        return np.concatenate([inactive, reactive, mask], axis=-1)


def fold_pixel_mask(mask: Shaped[np.ndarray, "T H W"], latents: Grid) -> Shaped[np.ndarray, "t h w s"]:
    """Return a mask of pixels on the latents' grid: the pixels of one frame that each position covers, row by row.

    The frame is the middle one between two latent frames. The mask of a single first frame therefore has no effect,
    only its pixels have; the models were trained this way (`nearest-exact` in PyTorch).
    """
    frames = (2 * np.arange(latents.t) + 1) * len(mask) // (2 * latents.t)
    return rearrange(mask[frames], "t (h y) (w x) -> t h w (y x)", h=latents.h, w=latents.w)


@dataclass(frozen=True, kw_only=True)
class VaceDitConfig(WanDitConfig):
    """Configuration of VACE's transformer; the defaults are VACE 1.3B's.

    Raises:
      UserError: If the conditioning is not one `VaceControl` whose number of layers divides the number of blocks, there
        are several attention patterns, or `WanDitConfig` refuses the values.
    """

    conditioning: tuple[ClipConditioning, ...] = (VaceControl(),)
    has_block_ranges: ClassVar[bool] = False

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

    def make(self, rngs: nnx.Rngs, partitioner: Partitioner = ONE_DEVICE) -> "VaceDit":
        return VaceDit(self, partitioner=partitioner, rngs=rngs)

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
    """Inputs of the control layers besides the inputs of all blocks."""

    state: Float[Array, "B N D"]
    """Input of the first control layer."""
    strengths: Float[Array, "J B G"]
    """Factors of the hints."""

    def take(self, kept: Int[Array, "B K"]) -> "ControlInputs":
        """Return the inputs of some of the tokens."""
        return self._replace(state=take_tokens(self.state, kept))


class VaceDit(WanDit):
    """VACE's transformer on packed rows, see `BlockBackbone`."""

    def __init__(self, config: VaceDitConfig, *, partitioner: Partitioner = ONE_DEVICE, rngs: nnx.Rngs):
        super().__init__(config, partitioner=partitioner, rngs=rngs)
        self.control = ControlStack(config, partitioner=partitioner, rngs=rngs)

    def embed_inputs(
        self,
        noisy: Float[Array, "B N p"],
        time: Float[Array, "B _"] | ClipTimes,
        layout: PackedRows,
        conditioning: Conditioning,
    ) -> tuple[Float[Array, "B N D"], WanInputs]:
        """Return the embedded tokens, and the blocks' other inputs, including the control layers'."""
        x, inputs = super().embed_inputs(noisy, time, layout, conditioning)
        control = conditioning[ControlLatents]
        state = x + self.control.input(self.control.embed(control.values)).astype(jnp.float32)
        return x, inputs._replace(control=ControlInputs(state, jnp.moveaxis(control.strengths, -1, 0)))

    def apply_blocks(
        self,
        x: Float[Array, "B N D"],
        inputs: WanInputs,
        *,
        layers: slice = slice(None),
        wrapper: LayerWrapper | None = None,
        values: Any = None,
    ) -> tuple[Float[Array, "B N D"], Any]:
        """Apply all blocks; see `BlockBackbone`. Control layers are not wrapped.

        Raises:
          UserError: If `layers` is a range; each control layer continues from the one before.
        """
        if layers != slice(None):
            rule = "control layers take turns with all blocks"
            raise UserError(f"layers={layers} is invalid for VACE: {rule}. Use slice(None).")
        config, control = self.config, inputs.control
        attention = self.partitioner.make_attention(config.attention, config.patterns[0])

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

    def __init__(self, config: VaceDitConfig, *, partitioner: Partitioner, rngs: nnx.Rngs):
        linear = functools.partial(Linear, dtype=jnp.dtype(config.dtype), partitioner=partitioner, rngs=rngs)
        self.embed = linear(config.control_width, config.width)
        self.input = linear(config.width, config.width, init="zero")
        make_layer = functools.partial(ControlLayer, config, partitioner=partitioner)
        self.blocks = make_stack(lambda r: make_layer(rngs=r), config.control.layers, rngs=rngs)


class ControlLayer(WanBlock):
    """A block of Wan with a hint for the main stack."""

    def __init__(self, config: WanDitConfig, *, partitioner: Partitioner, rngs: nnx.Rngs):
        super().__init__(config, partitioner=partitioner, rngs=rngs)
        dtype = jnp.dtype(config.dtype)
        # Zero weights, so that extending a trained model by control leaves its predictions unchanged.
        self.hint = Linear(config.width, config.width, init="zero", dtype=dtype, partitioner=partitioner, rngs=rngs)

    def make_hint(self, state: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        """Return the hint of the layer's output."""
        return self.hint(state).astype(jnp.float32)
