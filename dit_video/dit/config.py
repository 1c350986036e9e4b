"""The shape of a denoiser, and the sizes that have names."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from flax import nnx

from dit_video.dit.conditioning import ClassLabels, Context, CrossAttention, NoContext, TimeEmbedding
from dit_video.dit.positions import AbsolutePosition, EndDistances
from dit_video.errors import UserError
from dit_video.nn import Backend, Remat
from dit_video.tokens import Grid, Rotary3d

if TYPE_CHECKING:
    from dit_video.dit.model import Dit


@dataclass(frozen=True, kw_only=True)
class DitConfig:
    """A denoiser's shape.

    Raises:
      UserError: heads that do not divide the width, a rotary split that does not add up to the head width, a negative
        number of something, or a context without a width.
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
    rotary: Rotary3d | Literal["even", "none"] | None = "even"
    """`even`, or None as files of earlier versions may have it: `Rotary3d.even` of the head width"""
    absolute_position: AbsolutePosition | Literal["sinusoidal", "none"] | None = EndDistances()
    """what is added to the tokens; `sinusoidal` and `none` are earlier names of `EndDistances()` and None"""
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
        """A layer's products for each video token, in units of width²: what its cost is counted by."""
        crossed = 2 if isinstance(self.context, CrossAttention) else 0
        return 4 + crossed + (3 if self.mlp == "swiglu" else 2) * self.mlp_ratio

    def make(self, rngs: nnx.Rngs) -> "Dit":
        from dit_video.dit.model import Dit  # here, as the model is built on this file

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
