"""Architecture of the diffusion transformer."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import jax.numpy as jnp
from jaxtyping import Array

from dit_video.core.errors import UserError, check_at_least
from dit_video.models.backbones.dit.conditioning import (
    ClassLabels,
    ContextConfig,
    CrossAttention,
    JointAttention,
    NoContext,
    TimeEmbedding,
)
from dit_video.models.backbones.dit.positions import BoundaryEmbedding, PositionEmbedding
from dit_video.models.backbones.protocol import BackboneConfig, ClipTokens, count_self_pairs, count_tokens, widen_kernel
from dit_video.models.conditioning import ClipConditioning
from dit_video.nn import Backend, Remat
from dit_video.nn.attention import (
    Full,
    Pattern,
    PatternChoice,
    RelativeBias,
    SpaceOnly,
    TimeOnly,
    WithGlobalTokens,
    check_attention,
    count_pairs,
)
from dit_video.tokens import Grid, Rotary3d

TIME_FEATURES = 256
"""Number of sines and cosines of the time."""


@dataclass(frozen=True, kw_only=True)
class TemporalLayers:
    """Configuration of temporal layers, in which a token sees its position in all frames; other layers are spatial.

    `layers` temporal layers follow every group of `spatial_layers` spatial ones: 1 and 1 alternate (Latte, arXiv
    2401.03048, variant 1), 2 after 4 form blocks, and a group of all spatial layers puts the temporal ones at the end.
    They start as the identity, so a new video model applies the image model to each frame (`add_temporal_layers`). Only
    their parameters have `temporal` in their paths.

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
class DitArchitecture(BackboneConfig):
    """Fields of a `DitConfig`, with their checks and costs.

    Raises:
      UserError: If the heads do not divide the width, the rotary split does not add up to the head width, a count is
        negative, a context has no width, patterns do not divide the layers or the attention backend does not support
        them, or temporal layers are combined with tokens or patterns that are not limited to one frame.
    """

    channels: int
    """Number of latent channels."""
    context_width: int
    """Width of the text encoder's output (E); 0 for `NoContext`."""
    patch: Grid = Grid(1, 2, 2)
    width: int = 384
    layers: int = 6
    heads: int = 6
    mlp_ratio: float = 4.0
    """Ratio of the MLP's hidden width (for SwiGLU, of each of the two) to the model's width."""
    mlp: Literal["gelu", "swiglu"] = "gelu"
    bias: bool = True
    """True if the blocks' linear layers have a bias."""
    qk_norm: Literal["head", "full", "none"] = "head"
    """RMS norm of queries and keys: over each head, or over the full width before the split into heads."""
    order: Literal["sequential", "parallel"] = "sequential"
    """Order of a block's attention and MLP: one after the other, or both on the same input (arXiv 2302.05442)."""
    time_coordinate: Literal["tokens", "seconds"] = "tokens"
    """Unit of the time coordinate; with seconds, `Rotary3d.scale` sets the number of steps per second."""
    rotary: Rotary3d | Literal["even", "none"] = "even"
    """Rotary embedding; "even" is `Rotary3d.even` of the head width."""
    absolute_position: PositionEmbedding | None = BoundaryEmbedding()
    """Position embedding added to the tokens."""
    relative_bias: RelativeBias | None = None
    """Relative position bias, learned per layer; it needs the attention backend auto, dense or chunked."""
    pattern: PatternChoice | tuple[PatternChoice, ...] = Full()
    """Pattern of self-attention, or several that the layers use in turn: `(SpaceOnly(), TimeOnly())` is factorised
    attention. Registers, extra tokens and the text of joint attention belong to no frame: all tokens of the clip see
    them, and they see the whole clip. With a causal pattern they see only each other, as frames would otherwise depend
    on later ones."""
    temporal: TemporalLayers | None = None
    """Additional temporal layers between the layers of `pattern`, which must then be `SpaceOnly()`."""
    context: ContextConfig = CrossAttention()
    labels: ClassLabels | None = None
    modulation: Literal["shared", "own"] = "shared"
    """Modulation: projected once, with a table per block (PixArt, Wan), or with a projection per block (DiT)."""
    mlp_norm_eps: float = 1e-6
    """Epsilon of the norm before the MLP; in diffusers' `DiTTransformer2DModel` it differs from the one before
    attention."""
    time_embedding: TimeEmbedding = TimeEmbedding()
    variance: Literal["none", "predicted", "dropped"] = "none"
    """Learned variance (arXiv 2102.09672), for which the head has twice the channels: none, predicted as the second
    half of the channels at each position, or computed and dropped (SiT)."""
    time: Literal["segment", "token"] = "segment"
    """Diffusion time: one for all tokens of a clip, or one per token, which is 0 for tokens of known frames."""
    accepts_clip_times: ClassVar[bool] = True
    cond_channels: int = 0
    """Number of channels of clean latents and masks that accompany the noisy latents (`ConditioningLatents`)."""
    conditioning: tuple[ClipConditioning, ...] = ()
    """Conditioning on fields of the clips. Embeddings of values per frame or on the grid are added to the tokens,
    embeddings of values per clip modulate the blocks, and tokens of `extra` fields follow the clip's, at time 0."""
    registers: int = 0
    """Number of learned register tokens for each clip (arXiv 2309.16588)."""
    attention: Backend = "auto"
    dtype: str = "float32"
    """Dtype of the matrix products; norms, modulation and the residual stream are float32."""
    remat: Remat = "none"

    def __post_init__(self):
        if self.heads < 1 or self.width % self.heads:
            raise UserError(f"width {self.width} must be divisible by its {self.heads} heads, which must be 1 or more")
        if self.rotary == "even":
            object.__setattr__(self, "rotary", Rotary3d.even(self.width // self.heads))
        if isinstance(self.rotary, Rotary3d):
            self.rotary.check(self.width // self.heads)
        if self.absolute_position is not None:
            self.absolute_position.check(self.width)
        check_at_least(0, cond_channels=self.cond_channels, registers=self.registers)
        if isinstance(self.context, NoContext) != (self.context_width == 0):
            kind, width = type(self.context).__name__, self.context_width
            raise UserError(f"context_width={width} does not fit {kind}; use 0 for NoContext, else the encoder's width")
        for each in self.conditioning:
            if each.field.alignment == "sequence":
                raise UserError(
                    f"the field {each.field.name} is a sequence, which no layer attends to; use another model"
                )
        check_patterns(self.patterns, self.layers)
        check_attention(self.attention, *self.layer_patterns, biased=self.relative_bias is not None)
        if self.temporal is not None:
            self._check_temporal(self.temporal)

    def _check_temporal(self, temporal: TemporalLayers) -> None:
        if self.pattern != SpaceOnly():
            raise UserError(f"temporal layers need spatial ones: set pattern=SpaceOnly(), not {self.pattern}")
        if self.extra_tokens or isinstance(self.context, JointAttention):
            raise UserError(
                "temporal layers exclude registers, extra tokens and joint attention; use registers=0, another context"
            )
        if self.layers % temporal.spatial_layers:
            raise UserError(f"{self.layers} layers need a divisor as spatial_layers, not {temporal.spatial_layers}")
        self.time_rotary.check(self.width // self.heads)

    def check_cache(self) -> None:
        """Check that keys and values of finished frames can be kept, as they do not depend on later frames.

        Raises:
          UserError: If finished frames depend on later ones, or attention has a bias.
        """
        is_joint, position = isinstance(self.context, JointAttention), self.absolute_position
        depends = not all(pattern.causal for pattern in self.patterns) or self.registers or is_joint
        if depends or self.relative_bias is not None or (position is not None and position.needs_extent):
            raise UserError(
                "a cache is invalid for this model: finished frames must not depend on later ones. Use a causal "
                "pattern, absolute_position=None, registers=0, relative_bias=None and no joint attention."
            )

    @property
    def extra_tokens(self) -> int:
        """Return the number of tokens that join each clip's own: registers and tokens of `extra` fields."""
        return self.registers + sum(each.field.length for each in self.conditioning)

    @property
    def has_contiguous_clips(self) -> bool:
        return not self.extra_tokens and not isinstance(self.context, JointAttention)

    @property
    def has_attention_bias(self) -> bool:
        return self.relative_bias is not None

    @property
    def layer_patterns(self) -> tuple[Pattern, ...]:
        """Return the patterns, extended to tokens without a position if there are any."""
        patterns = self.patterns
        if self.has_contiguous_clips:
            return patterns
        seen = not any(pattern.causal for pattern in patterns)
        return tuple(p if isinstance(p, Full) else WithGlobalTokens(pattern=p, globals_see_all=seen) for p in patterns)

    @property
    def time_rotary(self) -> Rotary3d:
        """Return the rotary embedding of the temporal layers."""
        assert self.temporal is not None
        split, scale = (self.width // self.heads, 0, 0), (self.temporal.scale, 1.0, 1.0)
        return Rotary3d(split=split, theta=self.temporal.theta, scale=scale)

    @property
    def output_width(self) -> int:
        """Return the number of values that the head computes for one token."""
        return self.token_width * (1 if self.variance == "none" else 2)

    @property
    def class_count(self) -> int:
        return 0 if self.labels is None else self.labels.classes

    @property
    def predicts_variance(self) -> bool:
        return self.variance == "predicted"

    @property
    def mlp_dim(self) -> int:
        """Return the hidden width of the MLP."""
        return int(self.width * self.mlp_ratio)

    @property
    def layer_params(self) -> float:
        """Return the number of a layer's attention and MLP weights that act on each video token, in units of width².

        The weights of temporal layers are divided equally among the spatial layers.
        """
        cross = 2 if isinstance(self.context, CrossAttention) else 0
        block = 4 + (3 if self.mlp == "swiglu" else 2) * self.mlp_ratio
        temporal = 0 if self.temporal is None else self.temporal.layers / self.temporal.spatial_layers * block
        return block + cross + temporal

    def attention_pairs(self, grid: Grid) -> float:
        """Return the average number of token pairs per layer that attend to each other in a clip, the attention's cost.

        Temporal layers are divided as in `layer_params`; registers and the text of joint attention are not counted.
        """
        spatial = super().attention_pairs(grid)
        if self.temporal is None:
            return spatial
        return spatial + self.temporal.layers / self.temporal.spatial_layers * count_pairs(TimeOnly(), grid)

    def count_pairs(self, clip: ClipTokens, *, text: int) -> int:
        global_tokens = self.extra_tokens + (text if isinstance(self.context, JointAttention) else 0)
        cross_pairs = (count_tokens(clip) + global_tokens) * text if isinstance(self.context, CrossAttention) else 0
        return self.layers * cross_pairs + round(self.layers * count_self_pairs(self, clip, global_tokens))

    def count_multiplications(self, clip: ClipTokens, *, text: int, image: int) -> int:
        if image:
            raise UserError(f"this model has no image tokens; leave out images, of which this clip has {image}")
        width, layers, square = self.width, self.layers, self.width**2
        video_tokens = count_tokens(clip)
        tokens = video_tokens + self.extra_tokens
        block = 4 * square + (3 if self.mlp == "swiglu" else 2) * width * self.mlp_dim
        temporal = 0 if self.temporal is None else layers // self.temporal.spatial_layers * self.temporal.layers
        position = 0 if self.absolute_position is None else self.absolute_position.linear_features
        if temporal:
            position += BoundaryEmbedding().linear_features
        ends = video_tokens * width * (self.token_width + self.cond_width + position + self.output_width)
        per_block = self.modulation == "own"
        modulations = 2 + 6 * ((layers + temporal) if per_block else 1)
        # One time for noisy tokens, and one for clean ones; see `ClipTimes`.
        times = 1 + (self.time == "token" or self.extra_tokens > self.registers)
        conditions = times * (TIME_FEATURES * width + square + modulations * square)
        if self.context.pooled:
            conditions += self.context_width * width
        context = 0
        if isinstance(self.context, CrossAttention | JointAttention):
            context += text * self.context_width * width
        if isinstance(self.context, CrossAttention):
            context += layers * 2 * square * (tokens + text)
        if isinstance(self.context, JointAttention):
            context += layers * text * block + (6 * layers * square if per_block else 0)
            if self.time == "token":
                conditions += TIME_FEATURES * width + square + (0 if per_block else 6 * square)
        pairs = self.count_pairs(clip, text=text)
        return tokens * (layers + temporal) * block + ends + conditions + context + 2 * width * pairs

    def widen_conditioning(self, leaves: dict[str, Array], channels: int) -> dict[str, Array]:
        old = leaves.get("cond_embed/kernel", jnp.zeros((0, self.width), jnp.float32))
        return leaves | {"cond_embed/kernel": widen_kernel(old, self.patch.volume, channels)}


def check_patterns(patterns: tuple[PatternChoice, ...], layers: int) -> None:
    """Check that the layers can use the patterns in turn.

    Raises:
      UserError: If the number of patterns is zero, or does not divide the number of layers.
    """
    if not patterns or layers % len(patterns):
        raise UserError(f"{layers} layers cannot use {len(patterns)} patterns in turn; give 1 or a divisor of {layers}")
