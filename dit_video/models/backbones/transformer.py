"""Base of the configs of `DiT`, `MMDiT` and `SpatioTemporalDiT`: conditioning on text and time, checks and costs."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from dit_video.core.errors import UserError, check_at_least
from dit_video.models.backbones.positions import PositionEmbedding
from dit_video.models.backbones.protocol import BackboneConfig, ClipTokens, count_self_pairs, count_tokens, widen_kernel
from dit_video.nn.attention import Full, Pattern, PatternChoice, RelativeBias, WithGlobalTokens, check_attention
from dit_video.tokens import Rotary3d, compute_rotary_angles

TIME_SCALE = 1000.0
"""Scale of the model time: diffusion time is in [0, 1], but sinusoidal embeddings are designed for steps of about 1."""
TIME_FEATURES = 256
"""Number of sines and cosines of the time."""


@dataclass(frozen=True, kw_only=True)
class CrossAttention:
    """Ungated cross-attention of each block to the text's tokens (PixArt, arXiv 2310.00426)."""

    pooled: bool = True
    """True if the text's mean modulates the blocks, in addition to the time."""


@dataclass(frozen=True, kw_only=True)
class PooledContext:
    """Text that is used only through its mean, which modulates the blocks (DiT, arXiv 2212.09748)."""

    pooled: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class TimeEmbedding:
    """Configuration of the sinusoidal embedding of the diffusion time (0 = data, 1 = noise).

    Raises:
      UserError: If the scale or the period is not positive.
    """

    scale: float = TIME_SCALE
    """Factor from diffusion time to model time."""
    max_period: float = 10_000.0
    """Inverse of the lowest frequency, approximately."""
    reversed: bool = False
    """True if the model time runs from noise to data (SiT): the model receives `1 - time`, and its prediction, a
    velocity along its own time, is negated."""

    def __post_init__(self):
        if not (self.scale > 0 and self.max_period > 0):
            raise UserError(f"scale={self.scale}, max_period={self.max_period} of time is invalid; use positive values")

    def model_time(self, time: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
        """Return the model time, from which sines and cosines are computed."""
        return self.scale * (1 - time if self.reversed else time)


class TransformerConfig(BackboneConfig):
    """Config of a diffusion transformer on packed rows.

    The attributes below are fields of a subclass, or keep their value here.

    Raises:
      UserError: If a size is below 1, the heads do not divide the width, the rotary split does not add up to the head
        width, a count is negative, a field is a sequence, or the attention backend does not support the patterns.
    """

    context: CrossAttention | PooledContext = CrossAttention()
    """How text enters, if `context_width` is above 0."""
    mlp_ratio: float = 4.0
    """Ratio of the MLP's hidden width (for SwiGLU, of each of the two) to the model's width."""
    mlp: Literal["gelu", "swiglu"] = "gelu"
    mlp_norm_eps: float = 1e-6
    """Epsilon of the norm before the MLP."""
    bias: bool = True
    """True if the blocks' linear layers have a bias."""
    qk_norm: Literal["head", "full", "none"] = "head"
    """RMS norm of queries and keys: over each head, or over the full width before the split into heads."""
    order: Literal["sequential", "parallel"] = "sequential"
    """Order of a block's attention and MLP: one after the other, or both on the same input (arXiv 2302.05442)."""
    modulation: Literal["shared", "own"] = "shared"
    """Modulation: projected once, with a table per block, or with a projection per block."""
    rotary: Rotary3d | Literal["even", "none"] = "even"
    """Rotary embedding; "even" is `Rotary3d.even` of the head width."""
    absolute_position: PositionEmbedding | None = None
    """Position embedding added to the tokens."""
    relative_bias: RelativeBias | None = None
    """Relative position bias, learned per layer."""
    registers: int = 0
    """Number of learned register tokens for each clip."""
    time_embedding: TimeEmbedding = TimeEmbedding()
    variance: Literal["none", "predicted", "dropped"] = "none"
    """Learned variance, for which the head has twice the channels."""
    accepts_clip_times: ClassVar[bool] = True

    def __post_init__(self):
        self.check_sizes()
        head_width, remainder = divmod(self.width, self.heads)
        if remainder:
            raise UserError(f"width {self.width} must be divisible by its {self.heads} heads; change one")
        if self.rotary_embedding is not None:
            self.rotary_embedding.check(head_width)
        if self.absolute_position is not None:
            self.absolute_position.check(self.width)
        counts = {name: getattr(self, name) for name in ("context_width", "classes", "cond_channels", "registers")}
        check_at_least(0, **counts)
        for each in self.conditioning:
            if each.field.alignment == "sequence":
                raise UserError(
                    f"the field {each.field.name} is a sequence, which no layer attends to; use another model"
                )
        check_attention_patterns(self.patterns, self.layers)
        check_attention(self.attention, *self.layer_patterns, biased=self.relative_bias is not None)

    def check_cache(self) -> None:
        """Check that keys and values of finished frames can be kept, as they do not depend on later frames.

        Raises:
          UserError: If finished frames depend on later ones, or attention has a bias.
        """
        position = self.absolute_position
        depends = not all(pattern.causal for pattern in self.patterns) or self.registers > 0
        if depends or self.relative_bias is not None or (position is not None and position.needs_extent):
            raise UserError(
                "a cache is invalid for this model: finished frames must not depend on later ones. Use a DiT with a "
                "causal pattern, absolute_position=None, registers=0 and relative_bias=None."
            )

    @property
    def rotary_embedding(self) -> Rotary3d | None:
        """Return the rotary embedding of queries and keys; None for no rotation."""
        if isinstance(self.rotary, Rotary3d):
            return self.rotary
        return Rotary3d.even(self.width // self.heads) if self.rotary == "even" else None

    def compute_angles(self, positions: Float[Array, "B N 3"]) -> Float[Array, "B N half"] | None:
        """Return the rotary angles of queries and keys; None for no rotation."""
        return None if self.rotary_embedding is None else compute_rotary_angles(positions, self.rotary_embedding)

    @property
    def has_cross_attention(self) -> bool:
        """Return True if the blocks attend to the text by cross-attention."""
        return self.context_width > 0 and isinstance(self.context, CrossAttention)

    @property
    def embeds_text(self) -> bool:
        """Return True if the text's tokens are embedded, as attention sees them."""
        return self.has_cross_attention

    @property
    def pools_text(self) -> bool:
        """Return True if the text's mean modulates the blocks."""
        return self.context_width > 0 and self.context.pooled

    @property
    def extra_tokens(self) -> int:
        """Return the number of tokens that join each clip's own: registers and tokens of `extra` fields."""
        return self.registers + sum(each.field.length for each in self.conditioning)

    @property
    def has_contiguous_clips(self) -> bool:
        return not self.extra_tokens

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
    def output_width(self) -> int:
        """Return the number of values that the head computes for one token."""
        return self.token_width * (1 if self.variance == "none" else 2)

    @property
    def predicts_variance(self) -> bool:
        return self.variance == "predicted"

    @property
    def mlp_dim(self) -> int:
        """Return the hidden width of the MLP."""
        return int(self.width * self.mlp_ratio)

    @property
    def block_count(self) -> int:
        """Return the number of all blocks of the model."""
        return self.layers

    @property
    def position_features(self) -> int:
        """Return the number of features that linear layers map to the embeddings of positions."""
        return 0 if self.absolute_position is None else self.absolute_position.linear_features

    @property
    def layer_params(self) -> float:
        block = 4 + (3 if self.mlp == "swiglu" else 2) * self.mlp_ratio
        return self.block_count / self.layers * block + (2 if self.has_cross_attention else 0)

    def count_pairs(self, clip: ClipTokens, *, text: int) -> int:
        cross_pairs = (count_tokens(clip) + self.extra_tokens) * text if self.has_cross_attention else 0
        return self.layers * cross_pairs + round(self.layers * count_self_pairs(self, clip, self.extra_tokens))

    def count_multiplications(self, clip: ClipTokens, *, text: int, image: int) -> int:
        if image:
            raise UserError(f"this model has no image tokens; leave out images, of which this clip has {image}")
        width, square, tokens = self.width, self.width**2, count_tokens(clip)
        ends = tokens * width * (self.token_width + self.cond_width + self.position_features + self.output_width)
        blocks = (tokens + self.extra_tokens) * self.block_count * self.block_multiplications
        modulations = 2 + 6 * (self.block_count if self.modulation == "own" else 1)
        # One time for noisy tokens, and one for clean ones; see `ClipTimes`.
        times = 1 + (self.time == "token" or self.extra_tokens > self.registers)
        conditions = times * (TIME_FEATURES * width + square + modulations * square)
        if self.pools_text:
            conditions += self.context_width * width
        context = text * self.context_width * width if self.embeds_text else 0
        if self.has_cross_attention:
            context += self.layers * 2 * square * (tokens + self.extra_tokens + text)
        return blocks + ends + conditions + context + 2 * width * self.count_pairs(clip, text=text)

    @property
    def block_multiplications(self) -> int:
        """Return the number of multiplications by weights of self-attention and the MLP of a block, for one token."""
        return 4 * self.width**2 + (3 if self.mlp == "swiglu" else 2) * self.width * self.mlp_dim

    def widen_conditioning(self, leaves: dict[str, Array], channels: int) -> dict[str, Array]:
        old = leaves.get("cond_embed/kernel", jnp.zeros((0, self.width), jnp.float32))
        return leaves | {"cond_embed/kernel": widen_kernel(old, self.patch.volume, channels)}


def check_attention_patterns(patterns: tuple[PatternChoice, ...], layers: int) -> None:
    """Check that the layers can use the patterns in turn.

    Raises:
      UserError: If the number of patterns is zero, or does not divide the number of layers.
    """
    if not patterns or layers % len(patterns):
        raise UserError(f"{layers} layers cannot use {len(patterns)} patterns in turn; give 1 or a divisor of {layers}")
