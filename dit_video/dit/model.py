"""The spacetime diffusion transformer over packed rows.

Blocks as in DiT (arXiv 2212.09748) with text by cross-attention as in PixArt (arXiv 2310.00426); the modulation is
projected once and shared, each block adding its own table, as in Wan 2.1.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dit_video.arrays import AnyArray
from dit_video.errors import UserError
from dit_video.nn import (
    Attention,
    Backend,
    Linear,
    Remat,
    RmsNorm,
    apply_stack,
    layer_norm,
    make_attention,
    make_stack,
    modulate,
    sinusoidal,
)
from dit_video.tokens import Grid, Rotary3d, rotary_angles, rotate, segment_max, segment_mean, to_tokens

_TIME_SCALE = 1000.0
"""Diffusion time runs over [0, 1]; sinusoidal embeddings are made for steps of about one."""

_POSITION_WIDTH = 32
"""of the sines and cosines of one distance"""


@dataclass(frozen=True, kw_only=True)
class DitConfig:
    """A denoiser's shape.

    Raises:
      UserError: heads that do not divide the width, or a rotary split that does not add up to the head width.
    """

    channels: int
    """latent channels"""
    context_width: int
    """width of the text encoder (E)"""
    patch: Grid = Grid(1, 2, 2)
    width: int = 384
    layers: int = 6
    heads: int = 6
    mlp_ratio: float = 4.0
    rotary: Rotary3d | None = None
    """None: `Rotary3d.even` of the head width"""
    absolute_position: Literal["sinusoidal", "none"] = "sinusoidal"
    """Rotary positions are relative: from noise alone, attention cannot tell where in the clip a token lies. This adds
    each token's distance to both ends of its clip, along each axis."""
    attention: Backend = "auto"
    dtype: str = "float32"
    """of the matrix products; norms, modulation and the residual stream are float32"""
    remat: Remat = "none"

    def __post_init__(self):
        if self.heads < 1 or self.width % self.heads:
            raise UserError(f"width {self.width} must be divisible by its {self.heads} heads, at least 1")
        rotary = Rotary3d.even(self.width // self.heads) if self.rotary is None else self.rotary
        rotary.check(self.width // self.heads)
        object.__setattr__(self, "rotary", rotary)

    @property
    def token_width(self) -> int:
        """Values of one token (p)."""
        return self.patch.volume * self.channels

    def make(self, rngs: nnx.Rngs) -> "Dit":
        return Dit(self, rngs=rngs)


class Dit(nnx.Module):
    """`prediction = dit(noisy, time, ...)` on packed rows."""

    def __init__(self, config: DitConfig, *, rngs: nnx.Rngs):
        self.config = config
        width, dtype = config.width, jnp.dtype(config.dtype)
        self.embed = Linear(config.token_width, width, dtype=dtype, rngs=rngs)
        if config.absolute_position == "sinusoidal":
            self.position = Linear(6 * _POSITION_WIDTH, width, dtype=dtype, rngs=rngs)
        self.time_in, self.time_out = Linear(256, width, rngs=rngs), Linear(width, width, rngs=rngs)
        self.context_in = Linear(config.context_width, width, dtype=dtype, rngs=rngs)
        self.context_pooled = Linear(config.context_width, width, rngs=rngs)
        self.modulation = Linear(width, 6 * width, init="zero", rngs=rngs)
        self.blocks = make_stack(lambda r: Block(config, rngs=r), config.layers, rngs=rngs)
        self.head_modulation = Linear(width, 2 * width, init="zero", rngs=rngs)
        self.head = Linear(width, config.token_width, init="zero", rngs=rngs)

    def __call__(
        self,
        noisy: Float[Array, "B N p"],
        time: Float[Array, "B G"],
        *,
        segments: Int[Array, "B N"],
        coordinates: Float[Array, "B N 3"],
        context: Float[Array, "B S E"],
        context_segments: Int[Array, "B S"],
    ) -> Float[Array, "B N p"]:
        """Predict from noisy tokens at one diffusion time per segment (0 = data, 1 = noise)."""
        condition = self.condition(time, context, context_segments)
        modulation = self.modulation(condition).reshape(*condition.shape[:2], 6, -1)
        assert self.config.rotary is not None  # the config fills it in
        angles = rotary_angles(coordinates, self.config.rotary)
        x = self.embed(noisy)
        if self.config.absolute_position == "sinusoidal":
            x = x + self.position(_distances(coordinates, segments, count=time.shape[1]))
        x = apply_stack(
            self.blocks,
            x.astype(jnp.float32),
            to_tokens(modulation, segments),
            angles,
            segments,
            self.context_in(context),
            context_segments,
            remat=self.config.remat,
        )
        shift, scale = jnp.split(to_tokens(self.head_modulation(condition), segments), 2, axis=-1)
        return self.head(modulate(x, shift, scale))

    def condition(
        self,
        time: Float[Array, "B G"],
        context: Float[Array, "B S E"],
        context_segments: Int[Array, "B S"],
    ) -> Float[Array, "B G D"]:
        """What modulates a segment: its time and the mean of its context."""
        embedded = self.time_out(nnx.silu(self.time_in(sinusoidal(_TIME_SCALE * time, 256))))
        pooled = segment_mean(context.astype(jnp.float32), context_segments, count=time.shape[1])
        return nnx.silu(embedded + self.context_pooled(pooled))


def _distances(
    coordinates: Float[Array, "B N 3"], segments: Int[Array, "B N"], *, count: int
) -> Float[Array, "B N position"]:
    """Sines and cosines of the distances to the first and to the last token of the segment along each axis."""
    extent = jnp.stack([segment_max(coordinates[..., axis], segments, count=count) for axis in range(3)], axis=-1)
    both = jnp.concatenate([coordinates, to_tokens(extent, segments) - coordinates], axis=-1)
    return sinusoidal(both, _POSITION_WIDTH, period=100.0).reshape(*both.shape[:2], -1)


def packed_denoise(
    dit: Dit,
    *,
    segments: Int[AnyArray, "B N"],
    coordinates: Float[AnyArray, "B N 3"],
    context: Float[Array, "B S E"],
    context_segments: Int[Array, "B S"],
    count: int,
) -> Callable[[Float[Array, "B N p"], Float[Array, "B N"]], Float[Array, "B N p"]]:
    """`denoise(noisy, time)` of rows with up to `count` segments; all tokens of a segment have one time."""
    segments, coordinates = jnp.asarray(segments), jnp.asarray(coordinates)

    def denoise(noisy, time):
        return dit(
            noisy,
            segment_max(time, segments, count=count),
            segments=segments,
            coordinates=coordinates,
            context=context,
            context_segments=context_segments,
        )

    return denoise


class Block(nnx.Module):
    """Self-attention among a segment's tokens, cross-attention to its context, and a gelu MLP."""

    def __init__(self, config: DitConfig, *, rngs: nnx.Rngs):
        width, dtype = config.width, jnp.dtype(config.dtype)
        hidden = int(width * config.mlp_ratio)
        self.heads = config.heads
        self.attention: Attention = make_attention(config.attention)
        self.table = nnx.Param(jnp.zeros((6, width), jnp.float32))
        self.qkv = Linear(width, 3 * width, dtype=dtype, rngs=rngs)
        self.query_norm, self.key_norm = RmsNorm(width // config.heads), RmsNorm(width // config.heads)
        self.out = Linear(width, width, dtype=dtype, rngs=rngs)
        self.cross_query = Linear(width, width, dtype=dtype, rngs=rngs)
        self.cross_key_value = Linear(width, 2 * width, dtype=dtype, rngs=rngs)
        self.cross_query_norm, self.cross_key_norm = RmsNorm(width // config.heads), RmsNorm(width // config.heads)
        self.cross_out = Linear(width, width, init="zero", dtype=dtype, rngs=rngs)
        self.up = Linear(width, hidden, dtype=dtype, rngs=rngs)
        self.down = Linear(hidden, width, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B N D"],
        modulation: Float[Array, "B N 6 D"],
        angles: Float[Array, "B N half"],
        segments: Int[Array, "B N"],
        context: Float[Array, "B S D"],
        context_segments: Int[Array, "B S"],
    ) -> Float[Array, "B N D"]:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (
            modulation[:, :, index] + self.table[...][index] for index in range(6)
        )
        x = x + gate * self._self_attention(modulate(x, shift, scale), angles, segments)
        x = x + self._cross_attention(layer_norm(x), segments, context, context_segments)
        hidden = jax.nn.gelu(self.up(modulate(x, mlp_shift, mlp_scale)), approximate=True)
        return x + mlp_gate * self.down(hidden).astype(jnp.float32)

    def _self_attention(self, x, angles, segments):
        qkv = self.qkv(x).reshape(*x.shape[:2], 3, self.heads, -1)
        q = rotate(self.query_norm(qkv[:, :, 0]), angles)
        k = rotate(self.key_norm(qkv[:, :, 1]), angles)
        mixed = self.attention(q, k, qkv[:, :, 2], q_segments=segments, kv_segments=segments)
        return self.out(mixed.reshape(x.shape)).astype(jnp.float32)

    def _cross_attention(self, x, segments, context, context_segments):
        q = self.cross_query_norm(self.cross_query(x).reshape(*x.shape[:2], self.heads, -1))
        key_value = self.cross_key_value(context).reshape(*context.shape[:2], 2, self.heads, -1)
        k = self.cross_key_norm(key_value[:, :, 0])
        mixed = self.attention(q, k, key_value[:, :, 1], q_segments=segments, kv_segments=context_segments)
        return self.cross_out(mixed.reshape(x.shape)).astype(jnp.float32)
