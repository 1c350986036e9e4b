"""Wan's transformer (arXiv 2503.20314; Wan 2.1 and 2.2) over packed rows.

What it has of its own: queries and keys are normalised over the full width; the time is projected once for all blocks,
and the head's table is added to the time before that projection; the norm before the ungated cross-attention is
learned; a text is padded with zeros to a fixed length, and the padding is attended to.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dit_video.backbones.dit.blocks import Row, into_heads, spread
from dit_video.backbones.dit.conditioning import TIME_SCALE, Given
from dit_video.backbones.dit.config import check_patterns
from dit_video.core.errors import UserError
from dit_video.nn import (
    Attention,
    Backend,
    LayerNorm,
    Linear,
    Remat,
    RmsNorm,
    Tokens,
    Turns,
    apply_groups,
    gelu,
    make_attention,
    make_stack,
    modulate,
    sinusoidal,
)
from dit_video.nn.attention import Chosen, Full, Pattern, PatternChoice, check_attention, grid_indices
from dit_video.tokens import Grid, Rotary3d, positions, rotary_angles, rotate, to_tokens


@dataclass(frozen=True, kw_only=True)
class WanDitConfig:
    """The shape of one of Wan's transformers; the defaults are those of Wan 2.1 T2V 1.3B.

    Raises:
      UserError: heads that do not divide the width into even parts, a text length below 1, positions of image tokens
        without image tokens, or patterns that do not divide the layers or that the attention backend cannot do.
    """

    channels: int = 16
    """latent channels"""
    given_channels: int = 0
    """of the clean latents and masks beside the noisy latents (`Given.latents`): 20 in those that animate an image"""
    context_width: int = 4096
    """of the text encoder (E)"""
    text_length: int = 512
    """to which a text is padded with zeros"""
    image_width: int | None = None
    """of the image encoder (F), in the models that attend to an image's tokens (`Given.image`)"""
    image_positions: int | None = None
    """how many image tokens have learned positions: those of the first and the last frame together"""
    patch: Grid = Grid(1, 2, 2)
    width: int = 1536
    hidden_width: int = 8960
    """of the MLP"""
    layers: int = 30
    heads: int = 12
    time_width: int = 256
    """of the sines and cosines of the time"""
    time: Literal["segment", "token"] = "segment"
    """`token` in TI2V-5B, whose first latent frame is at time 0 where it is known (`Given.token_time`)"""
    pattern: PatternChoice | tuple[PatternChoice, ...] = Full()
    """what self-attention sees of the clip, or what the layers in turn see"""
    clock: ClassVar[Literal["tokens"]] = "tokens"
    """what coordinates count along time"""
    attention: Backend = "auto"
    dtype: str = "float32"
    """of the matrix products; norms, modulation and the residual stream are float32"""
    remat: Remat = "none"

    def __post_init__(self):
        if self.heads < 1 or self.width % self.heads or self.width // self.heads % 2:
            raise UserError(f"width {self.width} must be divisible by its {self.heads} heads, each an even part")
        if self.text_length < 1:
            raise UserError(f"texts are padded to 1 token or more, not {self.text_length}")
        if self.image_positions is not None and self.image_width is None:
            raise UserError(f"{self.image_positions} positions of image tokens need an image_width")
        check_patterns(self.patterns, self.layers)
        check_attention(self.attention, *self.patterns)

    @property
    def patterns(self) -> tuple[PatternChoice, ...]:
        """Of the layers in turn."""
        return self.pattern if isinstance(self.pattern, tuple) else (self.pattern,)

    @property
    def token_width(self) -> int:
        """Values of one token (p)."""
        return self.patch.volume * self.channels

    @property
    def given_width(self) -> int:
        """Values of the clean latents and masks of one token (g)."""
        return self.patch.volume * self.given_channels

    @property
    def rotary(self) -> Rotary3d:
        return Rotary3d.even(self.width // self.heads)

    @property
    def matrices(self) -> float:
        """A layer's products for each video token, in units of width²: what its cost is counted by."""
        return 6 + 2 * self.hidden_width / self.width

    def pairs(self, grid: Grid) -> float:
        """Pairs of a clip's tokens that attend to each other: all."""
        return float(grid.volume**2)

    def make(self, rngs: nnx.Rngs) -> "WanDit":
        return WanDit(self, rngs=rngs)

    @classmethod
    def t2v_1_3b(cls, **fields: Any) -> "WanDitConfig":
        """Wan 2.1 T2V 1.3B."""
        return cls(**fields)

    @classmethod
    def t2v_14b(cls, **fields: Any) -> "WanDitConfig":
        """Wan 2.1 T2V 14B, and both experts of Wan 2.2 T2V A14B."""
        return cls(**{"width": 5120, "hidden_width": 13824, "layers": 40, "heads": 40} | fields)

    @classmethod
    def i2v_14b(cls, **fields: Any) -> "WanDitConfig":
        """Wan 2.1 I2V 14B; both experts of Wan 2.2 I2V A14B with `image_width=None`."""
        return cls.t2v_14b(**{"given_channels": 20, "image_width": 1280} | fields)

    @classmethod
    def ti2v_5b(cls, **fields: Any) -> "WanDitConfig":
        """Wan 2.2 TI2V 5B."""
        shape = {"channels": 48, "width": 3072, "hidden_width": 14336, "layers": 30, "heads": 24}
        return cls(**shape | {"time": "token"} | fields)


class WanDit(nnx.Module):
    """`prediction = dit(noisy, time, ...)` on packed rows; its velocity points from data to noise."""

    def __init__(self, config: WanDitConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.attention: Callable[[Pattern], Attention] = Chosen(config.attention)
        width, dtype = config.width, jnp.dtype(config.dtype)
        self.embed = Linear(config.token_width + config.given_width, width, dtype=dtype, rngs=rngs)
        self.text_in = Linear(config.context_width, width, init="normal", dtype=dtype, rngs=rngs)
        self.text_out = Linear(width, width, init="normal", dtype=dtype, rngs=rngs)
        self.time_in = Linear(config.time_width, width, init="normal", rngs=rngs)
        self.time_out = Linear(width, width, init="normal", rngs=rngs)
        self.modulation = Linear(width, 6 * width, rngs=rngs)
        self.image = None if config.image_width is None else ImageTokens(config, rngs=rngs)
        self.blocks = make_stack(lambda r: WanBlock(config, rngs=r), config.layers, rngs=rngs)
        self.head_table = _table(2, width, rngs)
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
        given: Given = Given(),
    ) -> Float[Array, "B N p"]:
        """Predict from noisy tokens at one diffusion time per segment (0 = data, 1 = noise).

        A segment whose text is longer than the config's `text_length` gets NaN: tokenizers cut texts, and say so.

        Raises:
          UserError: something is given that the config does not ask for, or the other way round.
        """
        given.check(*self._wanted())
        at = time if given.token_time is None else given.token_time
        embedded = self.time_out(nnx.silu(self.time_in(sinusoidal(TIME_SCALE * at, self.config.time_width))))
        modulation = self.modulation(nnx.silu(embedded)).reshape(*at.shape, 6, -1)
        head = embedded[:, :, None] + self.head_table[...]
        if given.token_time is None:
            head = to_tokens(head, segments)
        text, fits = self._text(context, context_segments, count=time.shape[1])
        image = None
        if self.image is not None:
            assert given.image is not None  # as checked
            assert given.image_segments is not None
            image = (self.image(given.image, given.image_segments), given.image_segments)
        patterns = self.config.patterns
        indices = None if patterns == (Full(),) else grid_indices(coordinates, segments)
        row = Row(segments, Tokens.among(segments, indices), rotary_angles(coordinates, self.config.rotary))
        attentions = [self.attention(pattern) for pattern in patterns]
        x = apply_groups(
            self.embed(self._beside(noisy, given.latents)).astype(jnp.float32),
            [Turns(self.blocks, [(modulation, row, text, image, attention) for attention in attentions])],
            remat=self.config.remat,
        )
        prediction = self.head(modulate(x, head[:, :, 0], head[:, :, 1]))
        return jnp.where(to_tokens(fits, segments)[..., None], prediction, jnp.nan)

    def _wanted(self) -> list[str]:
        config, images = self.config, ["image", "image_segments"]
        return [
            *(["token_time"] if config.time == "token" else []),
            *(["latents"] if config.given_channels else []),
            *(images if config.image_width is not None else []),
        ]

    def _beside(self, noisy: Float[Array, "B N p"], given: Float[Array, "B N g"] | None) -> Float[Array, "B N _"]:
        """The channels of noisy and given latents side by side at each place of a patch."""
        if given is None:
            return noisy
        places = (*noisy.shape[:2], self.config.patch.volume, -1)
        both = jnp.concatenate([noisy.reshape(places), given.reshape(places)], axis=-1)
        return both.reshape(*noisy.shape[:2], -1)

    def _text(
        self, context: Float[Array, "B S E"], segments: Int[Array, "B S"], *, count: int
    ) -> tuple["PaddedText", Bool[Array, "B {count}"]]:
        """The embedded tokens, where each segment's padded text finds them, and whether it is long enough for them.

        All padding is one token, of zeros: it is projected once, and read many times.
        """
        rows, tokens = segments.shape
        length = self.config.text_length
        zeros = jnp.zeros((rows, 1, context.shape[2]), context.dtype)
        values = self.text_in(jnp.concatenate([context, zeros], axis=1))
        values = self.text_out(gelu(values))
        place = positions(segments)
        kept = (segments > 0) & (place < length)
        slots = jnp.where(kept, (segments - 1) * length + place, count * length)  # the last: none, and left out
        sources = (
            jnp.full((rows, count * length), tokens)
            .at[jnp.arange(rows)[:, None], slots]
            .set(jnp.arange(tokens), mode="drop")
        )
        longer = (segments[..., None] == jnp.arange(1, count + 1)) & (place >= length)[..., None]
        of = jnp.tile(jnp.repeat(jnp.arange(1, count + 1), length), (rows, 1))
        return (values, sources, of), ~longer.any(axis=1)


PaddedText = tuple[Float[Array, "B _ D"], Int[Array, "B M"], Int[Array, "B M"]]
"""Embedded tokens with one of padding at the end; for each place of the padded texts its token and its segment."""


class ImageTokens(nnx.Module):
    """An image encoder's tokens taken to the model's width: norm, linear, gelu, linear, norm."""

    def __init__(self, config: WanDitConfig, *, rngs: nnx.Rngs):
        assert config.image_width is not None
        given, width, dtype = config.image_width, config.width, jnp.dtype(config.dtype)
        entries = config.image_positions
        self.positions = None if entries is None else nnx.Param(jnp.zeros((entries, given), jnp.float32))
        self.norm_in, self.norm_out = LayerNorm(given, eps=1e-5), LayerNorm(width, eps=1e-5)
        self.up = Linear(given, given, dtype=dtype, rngs=rngs)
        self.down = Linear(given, width, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: Float[Array, "B I F"], segments: Int[Array, "B I"]) -> Float[Array, "B I D"]:
        if self.positions is not None:
            # More tokens than there are positions give NaN; padding may be longer.
            at = jnp.where(segments > 0, positions(segments), 0)
            tokens = tokens + self.positions[...].at[at].get(mode="fill", fill_value=jnp.nan)
        return self.norm_out(self.down(jax.nn.gelu(self.up(self.norm_in(tokens)), approximate=False)))


class WanBlock(nnx.Module):
    """Self-attention, cross-attention to the text and, in a sum with it, to an image's tokens, and a tanh-gelu MLP.

    Pairs of channels (j, j + d/2) are turned by rotary positions: in Wan's files they are neighbours.
    """

    def __init__(self, config: WanDitConfig, *, rngs: nnx.Rngs):
        width, dtype = config.width, jnp.dtype(config.dtype)

        def square() -> Linear:
            return Linear(width, width, dtype=dtype, rngs=rngs)

        self.heads, self.per_token = config.heads, config.time == "token"
        self.cross: Attention = make_attention(config.attention)
        self.table = _table(6, width, rngs)
        self.query, self.key, self.value, self.out = square(), square(), square(), square()
        self.query_norm, self.key_norm = RmsNorm(width), RmsNorm(width)
        self.cross_norm = LayerNorm(width)
        self.cross_query, self.cross_key, self.cross_value, self.cross_out = square(), square(), square(), square()
        self.cross_query_norm, self.cross_key_norm = RmsNorm(width), RmsNorm(width)
        self.sees_image = config.image_width is not None
        if self.sees_image:
            self.image_key, self.image_value, self.image_key_norm = square(), square(), RmsNorm(width)
        self.up = Linear(width, config.hidden_width, dtype=dtype, rngs=rngs)
        self.down = Linear(config.hidden_width, width, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B N D"],
        modulation: Float[Array, "B _ 6 D"],
        row: Row,
        text: PaddedText,
        image: tuple[Float[Array, "B I D"], Int[Array, "B I"]] | None,
        attention: Attention,
    ) -> Float[Array, "B N D"]:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (
            spread(modulation[:, :, index] + self.table[...][index], row.segments, per_token=self.per_token)
            for index in range(6)
        )
        x = x + gate * self._self_attention(modulate(x, shift, scale), row, attention)
        x = x + self._cross_attention(self.cross_norm(x), row.segments, text, image)
        hidden = gelu(self.up(modulate(x, mlp_shift, mlp_scale)))
        return x + mlp_gate * self.down(hidden).astype(jnp.float32)

    def _self_attention(self, x, row, attention):
        q = rotate(into_heads(self.query(x), self.query_norm, self.heads), row.angles)
        k = rotate(into_heads(self.key(x), self.key_norm, self.heads), row.angles)
        v = into_heads(self.value(x), None, self.heads)
        mixed = attention(q, k, v, row.at)
        return self.out(mixed.reshape(x.shape)).astype(jnp.float32)

    def _cross_attention(self, x, segments, text, image):
        q = into_heads(self.cross_query(x), self.cross_query_norm, self.heads)
        values, sources, of = text
        k = into_heads(self.cross_key(values), self.cross_key_norm, self.heads)
        v = into_heads(self.cross_value(values), None, self.heads)
        k, v = (jax.vmap(lambda row, at: row[at])(each, sources) for each in (k, v))
        mixed = self.cross(q, k, v, Tokens(segments, of))
        if self.sees_image:
            tokens, image_segments = image
            k = into_heads(self.image_key(tokens), self.image_key_norm, self.heads)
            v = into_heads(self.image_value(tokens), None, self.heads)
            mixed = mixed + self.cross(q, k, v, Tokens(segments, image_segments))
        return self.cross_out(mixed.reshape(x.shape)).astype(jnp.float32)


def _table(entries: int, width: int, rngs: nnx.Rngs) -> nnx.Param:
    return nnx.Param(jax.random.normal(rngs.params(), (entries, width), jnp.float32) / width**0.5)
