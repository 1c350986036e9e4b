"""The shape of a denoiser, and the sizes that have names."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from flax import nnx

from dit_video.backbones.dit.conditioning import (
    ClassLabels,
    Context,
    CrossAttention,
    JointAttention,
    NoContext,
    TimeEmbedding,
)
from dit_video.backbones.dit.positions import AbsolutePosition, EndDistances
from dit_video.core.errors import UserError
from dit_video.nn import Backend, Remat
from dit_video.nn.attention import (
    Full,
    Pattern,
    PatternChoice,
    RelativeBias,
    SpaceOnly,
    TimeOnly,
    WithPlaceless,
    check_attention,
    pair_count,
)
from dit_video.tokens import Grid, Rotary3d

if TYPE_CHECKING:
    from dit_video.backbones.dit.model import Dit


@dataclass(frozen=True, kw_only=True)
class Temporal:
    """Layers in which every token sees the same place in all frames, among spatial layers that see one frame each.

    After every `every` spatial layers come `layers` temporal ones: 1 and 1 alternate (Latte, arXiv 2401.03048, variant
    1), 4 and 2 are blocks, and `every` as large as the number of spatial layers puts all of them at the end. They begin
    as the identity: a fresh video model is an image model of each frame (`image_to_video`). Their parameters alone have
    `temporal` in their paths.

    Raises:
      UserError: fewer than 1 of something.
    """

    every: int = 1
    layers: int = 1
    theta: float = 10_000.0
    scale: float = 1.0
    """of their rotary positions, of time alone over the whole head width; see `Rotary3d`"""

    def __post_init__(self):
        if self.every < 1 or self.layers < 1:
            raise UserError(
                f"after 1 spatial layer or more comes 1 temporal one or more, not {self.layers} after {self.every}"
            )


@dataclass(frozen=True, kw_only=True)
class DitConfig:
    """A denoiser's shape.

    Raises:
      UserError: heads that do not divide the width, a rotary split that does not add up to the head width, a negative
        number of something, a context without a width, patterns that do not divide the layers or that the attention
        backend cannot do, or temporal layers beside what is not of one frame.
    """

    channels: int
    """latent channels"""
    context_width: int
    """width of the text encoder (E); 0 for `NoContext`"""
    patch: Grid = Grid(1, 2, 2)
    width: int = 384
    layers: int = 6
    heads: int = 6
    mlp_ratio: float = 4.0
    """width of the MLP's hidden layer (each of the two of a SwiGLU) / width"""
    mlp: Literal["gelu", "swiglu"] = "gelu"
    bias: bool = True
    """of the blocks' linear maps"""
    qk_norm: Literal["head", "full", "none"] = "head"
    """RMS norm of queries and keys: over each head, or over the full width before it is divided into heads"""
    order: Literal["sequential", "parallel"] = "sequential"
    """whether a block's attention and MLP follow each other, or are computed of the same input (arXiv 2302.05442)"""
    clock: Literal["tokens", "seconds"] = "tokens"
    """what coordinates count along time; with seconds, `Rotary3d.scale` says how many steps one is worth"""
    rotary: Rotary3d | Literal["even", "none"] | None = "even"
    """`even`, or None as files of earlier versions may have it: `Rotary3d.even` of the head width"""
    absolute_position: AbsolutePosition | Literal["sinusoidal", "none"] | None = EndDistances()
    """what is added to the tokens; `sinusoidal` and `none` are earlier names of `EndDistances()` and None"""
    relative_bias: RelativeBias | None = None
    """learned, by each layer for itself; for the attention backends dense and chunked, which are those of auto"""
    pattern: PatternChoice | tuple[PatternChoice, ...] = Full()
    """what self-attention sees of the clip, or what the layers in turn see: `(SpaceOnly(), TimeOnly())` is factorised
    attention. Registers and the texts of a joint attention lie in no frame: all of the clip see them, and they see all
    of it; but only each other where a pattern is causal, as no frame shall learn of later ones through them."""
    temporal: Temporal | None = None
    """layers of their own, beside those of this pattern, which is `SpaceOnly()`"""
    context: Context = CrossAttention()
    labels: ClassLabels | None = None
    modulation: Literal["shared", "own"] = "shared"
    """projected once, each block adding a table (PixArt, Wan), or by each block for itself (DiT)"""
    mlp_norm_eps: float = 1e-6
    """of the norm before the MLP; diffusers' `DiTTransformer2DModel` has another there than before attention"""
    time_embedding: TimeEmbedding = TimeEmbedding()
    variance: Literal["none", "predicted", "dropped"] = "none"
    """whether the head has as many channels again, a learned variance (arXiv 2102.09672): with the prediction, as the
    second half of each place's channels, or left out (SiT)"""
    time: Literal["segment", "token"] = "segment"
    """whether all tokens of a clip have one diffusion time, or each its own (`Given.token_time`)"""
    given_channels: int = 0
    """channels of the clean latents and masks that come with the noisy latents (`Given.latents`)"""
    registers: int = 0
    """learned tokens beside those of each clip (arXiv 2309.16588)"""
    attention: Backend = "auto"
    dtype: str = "float32"
    """of the matrix products; norms, modulation and the residual stream are float32"""
    remat: Remat = "none"

    def __post_init__(self):
        if self.heads < 1 or self.width % self.heads:
            raise UserError(f"width {self.width} must be divisible by its {self.heads} heads, at least 1")
        if self.rotary is None or self.rotary == "even":
            object.__setattr__(self, "rotary", Rotary3d.even(self.width // self.heads))
        if isinstance(self.rotary, Rotary3d):
            self.rotary.check(self.width // self.heads)
        if isinstance(self.absolute_position, str):
            named = EndDistances() if self.absolute_position == "sinusoidal" else None
            object.__setattr__(self, "absolute_position", named)
        if self.added_position is not None:
            self.added_position.check(self.width)
        for name in ("given_channels", "registers"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must be 0 or more, not {getattr(self, name)}")
        if isinstance(self.context, NoContext) != (self.context_width == 0):
            raise UserError(
                f"a context_width of {self.context_width} does not go with {type(self.context).__name__}; "
                "NoContext has 0, all others have the text encoder's"
            )
        check_patterns(self.patterns, self.layers)
        check_attention(self.attention, *self.layer_patterns, biased=self.relative_bias is not None)
        if self.temporal is not None:
            self._check_temporal(self.temporal)

    def _check_temporal(self, temporal: Temporal) -> None:
        if self.pattern != SpaceOnly():
            raise UserError(f"temporal layers go between spatial ones: set pattern=SpaceOnly(), not {self.pattern}")
        if self.registers or isinstance(self.context, JointAttention):
            raise UserError("registers and joint attention join frames: temporal layers go with neither")
        if self.layers % temporal.every:
            raise UserError(f"{self.layers} layers cannot have temporal ones after every {temporal.every}")
        self.time_rotary.check(self.width // self.heads)

    @property
    def patterns(self) -> tuple[PatternChoice, ...]:
        """Of the layers in turn."""
        return self.pattern if isinstance(self.pattern, tuple) else (self.pattern,)

    @property
    def layer_patterns(self) -> tuple[Pattern, ...]:
        """The same, with what they say of tokens that lie in no frame."""
        if not self.registers and not isinstance(self.context, JointAttention):
            return self.patterns
        seeing = not any(pattern.causal for pattern in self.patterns)
        return tuple(
            pattern if isinstance(pattern, Full) else WithPlaceless(pattern=pattern, seeing=seeing)
            for pattern in self.patterns
        )

    @property
    def time_rotary(self) -> Rotary3d:
        """Of the temporal layers."""
        assert self.temporal is not None
        split, scale = (self.width // self.heads, 0, 0), (self.temporal.scale, 1.0, 1.0)
        return Rotary3d(split=split, theta=self.temporal.theta, scale=scale)

    @property
    def token_width(self) -> int:
        """Values of one token (p)."""
        return self.patch.volume * self.channels

    @property
    def added_position(self) -> AbsolutePosition | None:
        """`absolute_position`, under whatever name it was given."""
        assert not isinstance(self.absolute_position, str)  # names are replaced above
        return self.absolute_position

    @property
    def head_width(self) -> int:
        """Values that the head computes for one token."""
        return self.token_width * (1 if self.variance == "none" else 2)

    @property
    def given_width(self) -> int:
        """Values of the clean latents and masks of one token (g)."""
        return self.patch.volume * self.given_channels

    @property
    def hidden_width(self) -> int:
        """of the MLP"""
        return int(self.width * self.mlp_ratio)

    @property
    def matrices(self) -> float:
        """A layer's products for each video token, in units of width²: what its cost is counted by.

        Of temporal layers each has its share of those between them.
        """
        crossed = 2 if isinstance(self.context, CrossAttention) else 0
        own = 4 + (3 if self.mlp == "swiglu" else 2) * self.mlp_ratio
        return own + crossed + (0 if self.temporal is None else self.temporal.layers / self.temporal.every * own)

    def pairs(self, grid: Grid) -> float:
        """Pairs of a clip's tokens that attend to each other, in a layer on average: what attention costs.

        Temporal layers are shared as in `matrices`; registers and texts in the same attention are not counted.
        """
        own = sum(pair_count(pattern, grid) for pattern in self.patterns) / len(self.patterns)
        if self.temporal is None:
            return own
        return own + self.temporal.layers / self.temporal.every * pair_count(TimeOnly(), grid)

    def make(self, rngs: nnx.Rngs) -> "Dit":
        from dit_video.backbones.dit.model import Dit  # here, as the model is built on this file

        return Dit(self, rngs=rngs)

    @classmethod
    def small(cls, **fields: Any) -> "DitConfig":
        """DiT-S (arXiv 2212.09748, table 1); like all sizes it takes the other fields, `channels` among them."""
        return cls(**{"width": 384, "layers": 12, "heads": 6} | fields)

    @classmethod
    def base(cls, **fields: Any) -> "DitConfig":
        """DiT-B."""
        return cls(**{"width": 768, "layers": 12, "heads": 12} | fields)

    @classmethod
    def large(cls, **fields: Any) -> "DitConfig":
        """DiT-L."""
        return cls(**{"width": 1024, "layers": 24, "heads": 16} | fields)

    @classmethod
    def extra_large(cls, **fields: Any) -> "DitConfig":
        """DiT-XL."""
        return cls(**{"width": 1152, "layers": 28, "heads": 16} | fields)

    @classmethod
    def billion_1(cls, **fields: Any) -> "DitConfig":
        """1.1 billion parameters with cross-attention."""
        return cls(**{"width": 1536, "layers": 28, "heads": 12} | fields)

    @classmethod
    def billion_5(cls, **fields: Any) -> "DitConfig":
        """5 billion parameters with cross-attention."""
        return cls(**{"width": 3072, "layers": 32, "heads": 24} | fields)

    @classmethod
    def billion_14(cls, **fields: Any) -> "DitConfig":
        """14 billion parameters with cross-attention."""
        return cls(**{"width": 5120, "layers": 33, "heads": 40} | fields)


def check_patterns(patterns: tuple[PatternChoice, ...], layers: int) -> None:
    """Raises UserError where the layers cannot take the patterns in turn."""
    if not patterns or layers % len(patterns):
        raise UserError(f"{layers} layers cannot take {len(patterns)} patterns in turn; give them 1, or a divisor")
