"""Spatiotemporal diffusion transformer over packed rows: image blocks, and temporal blocks between them.

Spatial blocks see a frame, temporal blocks one position in all frames (Latte, arXiv 2401.03048; Kandinsky Video, arXiv
2311.13073). Temporal blocks start as the identity, and time has an embedding of its own, so a trained image model
becomes a video model that predicts every frame as before: see `conversion.grow`.
"""

import functools
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from dit_video.core.errors import UserError, check_at_least
from dit_video.models.backbones.blocks import DiTInputs, Stream
from dit_video.models.backbones.dit import DiT
from dit_video.models.backbones.positions import BoundaryEmbedding, PositionEmbedding
from dit_video.models.backbones.protocol import ClipTimes
from dit_video.models.backbones.transformer import CrossAttention, PooledContext, TimeEmbedding, TransformerConfig
from dit_video.models.conditioning import ClipConditioning, Conditioning
from dit_video.nn import (
    ONE_DEVICE,
    Attention,
    Backend,
    Init,
    LayerGroup,
    LayerWrapper,
    Partitioner,
    Remat,
    make_stack,
    modulate,
    scan_layers,
)
from dit_video.nn.attention import PatternChoice, SpaceOnly, TimeOnly, count_pairs
from dit_video.tokens import Grid, PackedRows, Rotary3d, compute_rotary_angles

_TIME_AXIS = np.asarray([1, 0, 0], np.float32)
"""Mask of the time axis in positions (t, h, w)."""


@dataclass(frozen=True, kw_only=True)
class TemporalLayers:
    """Configuration of temporal layers.

    `layers` temporal layers follow every group of `spatial_layers` spatial ones: 1 and 1 alternate (Latte, variant 1),
    2 after 4 form blocks, and a group of all spatial layers puts the temporal ones at the end. Only their parameters
    have `temporal` in their paths.

    Raises:
      UserError: If there is no layer of one of the kinds.
    """

    spatial_layers: int = 1
    """Number of spatial layers in a group."""
    layers: int = 1
    """Number of temporal layers after each group."""
    theta: float = 10_000.0
    """Base of their rotary frequencies, which encode time over the whole head width; see `Rotary3d`."""
    scale: float = 1.0
    """Factor of the time coordinate in their rotary embedding; see `Rotary3d`."""

    def __post_init__(self):
        check_at_least(1, layers=self.layers, spatial_layers=self.spatial_layers)


@dataclass(frozen=True, kw_only=True)
class SpatioTemporalDiTConfig(TransformerConfig):
    """Configuration of the spatiotemporal diffusion transformer; fields without a description are as in `DiTConfig`.

    Raises:
      UserError: If a size is below 1, the heads do not divide the width, the rotary split does not add up to the head
        width, a count is negative, a field has extra tokens, which would belong to no frame, or the groups do not
        divide the layers.
    """

    channels: int
    context_width: int
    context: CrossAttention | PooledContext = CrossAttention()
    classes: int = 0
    patch: Grid = Grid(1, 2, 2)
    width: int = 384
    layers: int = 6
    """Number of spatial layers."""
    temporal: TemporalLayers = TemporalLayers()
    """Temporal layers between the spatial ones."""
    heads: int = 6
    mlp_ratio: float = 4.0
    mlp: Literal["gelu", "swiglu"] = "gelu"
    mlp_norm_eps: float = 1e-6
    bias: bool = True
    qk_norm: Literal["head", "full", "none"] = "head"
    modulation: Literal["shared", "own"] = "shared"
    time_coordinate: Literal["tokens", "seconds"] = "tokens"
    rotary: Rotary3d | Literal["even", "none"] = "even"
    """Rotary embedding of spatial layers, which ignore the time coordinate."""
    absolute_position: PositionEmbedding | None = BoundaryEmbedding()
    """Position embedding added to the tokens, in addition to that of time."""
    pattern: ClassVar[PatternChoice] = SpaceOnly()  # type: ignore[misc]
    time: Literal["segment", "token"] = "segment"
    time_embedding: TimeEmbedding = TimeEmbedding()
    variance: Literal["none", "predicted", "dropped"] = "none"
    cond_channels: int = 0
    conditioning: tuple[ClipConditioning, ...] = ()
    attention: Backend = "auto"
    dtype: str = "float32"
    remat: Remat = "none"

    def __post_init__(self):
        super().__post_init__()
        for each in self.conditioning:
            if each.field.alignment == "extra":
                raise UserError(f"the field {each.field.name} has tokens that belong to no frame; use DiTConfig")
        if self.layers % self.temporal.spatial_layers:
            raise UserError(
                f"{self.layers} layers need a divisor as spatial_layers, not {self.temporal.spatial_layers}"
            )
        self.time_rotary.check(self.width // self.heads)

    def check_cache(self) -> None:
        raise UserError("a cache is invalid for SpatioTemporalDiT: temporal layers see later frames. Use DiT.")

    @property
    def time_rotary(self) -> Rotary3d:
        """Return the rotary embedding of the temporal layers."""
        split, scale = (self.width // self.heads, 0, 0), (self.temporal.scale, 1.0, 1.0)
        return Rotary3d(split=split, theta=self.temporal.theta, scale=scale)

    @property
    def temporal_layers(self) -> int:
        """Return the number of all temporal layers."""
        return self.layers // self.temporal.spatial_layers * self.temporal.layers

    @property
    def block_count(self) -> int:
        return self.layers + self.temporal_layers

    @property
    def position_features(self) -> int:
        return super().position_features + BoundaryEmbedding().linear_features

    def attention_pairs(self, grid: Grid) -> float:
        """Return the average number of token pairs per spatial layer; those of temporal layers are divided equally."""
        return super().attention_pairs(grid) + self.temporal_layers / self.layers * count_pairs(TimeOnly(), grid)

    def make(self, rngs: nnx.Rngs, partitioner: Partitioner = ONE_DEVICE) -> "SpatioTemporalDiT":
        return SpatioTemporalDiT(self, partitioner=partitioner, rngs=rngs)


class TemporalBlock(Stream):
    """A block with attention over the frames at one position, and an MLP; it is the identity until it is trained.

    Its output layers start at zero, so gates are `1 + gate`: if both were zero in a new model, neither would get a
    gradient.
    """

    output_init: ClassVar[Init] = "zero"

    def __call__(self, x: Float[Array, "B N D"], inputs: DiTInputs, attention: Attention) -> Float[Array, "B N D"]:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.compute_modulation(inputs.modulation)
        q, k, v = self.project_qkv(modulate(x, shift, scale), inputs.angles)
        x = x + (1 + gate) * self.project_out(attention(q, k, v, inputs.attention_inputs))
        return x + (1 + mlp_gate) * self.apply_mlp(x, mlp_shift, mlp_scale)


class SpatioTemporalInputs(NamedTuple):
    """Inputs of all blocks besides the tokens and the attention function."""

    space: DiTInputs
    """Inputs of spatial blocks."""
    time: DiTInputs
    """Inputs of temporal blocks."""

    @property
    def condition(self) -> Any:
        """Return the conditions from which the head projects its modulation."""
        return self.space.condition

    def take(self, kept: Int[Array, "B K"]) -> "SpatioTemporalInputs":
        """Return the inputs of some of the tokens; see `TransformerInputs`."""
        return SpatioTemporalInputs(self.space.take(kept), self.time.take(kept))


class SpatioTemporalDiT(DiT):
    """The spatiotemporal diffusion transformer on packed rows; see `BlockBackbone`."""

    config: SpatioTemporalDiTConfig

    def __init__(self, config: SpatioTemporalDiTConfig, *, partitioner: Partitioner = ONE_DEVICE, rngs: nnx.Rngs):
        super().__init__(config, partitioner=partitioner, rngs=rngs)
        dtype = jnp.dtype(config.dtype)
        self.temporal_position = BoundaryEmbedding().make(
            config.width, init="zero", dtype=dtype, partitioner=partitioner, rngs=rngs
        )
        make = functools.partial(TemporalBlock, config, partitioner=partitioner)
        self.temporal_blocks = make_stack(lambda r: make(rngs=r), config.temporal_layers, rngs=rngs)

    def embed_inputs(
        self,
        noisy: Float[Array, "B N p"],
        time: Float[Array, "B _"] | ClipTimes,
        layout: PackedRows,
        conditioning: Conditioning,
    ) -> tuple[Float[Array, "B N D"], SpatioTemporalInputs]:
        """Return the embedded tokens, and the blocks' other inputs; spatial blocks ignore the time of a token."""
        config, positions = self.config, jnp.asarray(layout.positions)
        tokens = self.append_extras(self.embed_tokens(noisy, layout, conditioning), layout, conditioning)
        condition, _ = self.embed_conditions(tokens, time, layout, conditioning)
        space = DiTInputs(
            condition=condition,
            modulation=self.project_modulation(condition),
            angles=config.compute_angles(positions * (1 - _TIME_AXIS)),
            attention_inputs=self.make_attention_inputs(tokens.segments, layout),
            context=self.embed_text(conditioning) if config.embeds_text else None,
        )
        angles = compute_rotary_angles(positions, config.time_rotary)
        return tokens.x, SpatioTemporalInputs(space, space._replace(angles=angles))

    def add_positions(
        self, x: Float[Array, "B N D"], positions: Float[Array, "B N 3"], layout: PackedRows
    ) -> Float[Array, "B N D"]:
        """Add the embedding of time, and that of the position in a frame."""
        # Time has an embedding of its own, so that all other parts process every frame as an image.
        features = BoundaryEmbedding().compute_features(
            positions * _TIME_AXIS, jnp.asarray(layout.segments), count=layout.count, width=self.config.width
        )
        return super().add_positions(x + self.temporal_position(features), positions * (1 - _TIME_AXIS), layout)

    def apply_blocks(
        self,
        x: Float[Array, "B N D"],
        inputs: SpatioTemporalInputs,
        *,
        layers: slice = slice(None),
        wrapper: LayerWrapper | None = None,
        values: Any = None,
    ) -> tuple[Float[Array, "B N D"], Any]:
        """Apply all blocks, or a range of the spatial ones; see `BlockBackbone`.

        Temporal blocks are not wrapped. They are applied after the last spatial block of their group.
        """
        config, make_attention = self.config, self.partitioner.make_attention
        space = (inputs.space, make_attention(config.attention, config.pattern))
        time = (inputs.time, make_attention(config.attention, TimeOnly()))
        groups = [
            LayerGroup(self.blocks, [space] * config.temporal.spatial_layers, wrapper, values),
            LayerGroup(self.temporal_blocks, [time] * config.temporal.layers),
        ]
        x, (outputs, _) = scan_layers(x, groups, layers=layers, remat=config.remat)
        return x, outputs
