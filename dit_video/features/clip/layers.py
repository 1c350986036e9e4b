"""What CLIP's two towers have in common: their shape and their pre-norm transformer layers."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from dit_video.core.errors import UserError
from dit_video.nn import LayerNorm, Linear

Activation = Literal["quick_gelu", "gelu"]
"""`x sigmoid(1.702 x)` of OpenAI's models, or gelu with the error function, of OpenCLIP's"""
ACTIVATIONS: tuple[Activation, ...] = ("quick_gelu", "gelu")
_DTYPES = ("float32", "bfloat16")
# Not -inf, which would make NaN of a token that sees nothing.
_MASKED = -1e30


@dataclass(frozen=True, kw_only=True)
class ClipTower:
    """The shape of a tower, but for what it reads.

    Raises:
      UserError: a size below 1, heads that do not divide the width, or another dtype.
    """

    width: int
    layers: int
    heads: int
    mlp_width: int
    activation: Activation = "quick_gelu"
    eps: float = 1e-5
    projection: int | None = None
    """the width of the space where texts and images are compared; None where there is no map into it"""
    dtype: str = "float32"
    """of the matrix products, or bfloat16; norms, softmax and the sum of the layers' results are float32"""

    def __post_init__(self):
        self.check_sizes(
            "width", "layers", "heads", "mlp_width", *(("projection",) if self.projection is not None else ())
        )
        if self.width % self.heads:
            raise UserError(
                f"the width {self.width} of a CLIP tower is not divisible by {self.heads} heads; change one"
            )
        if self.dtype not in _DTYPES:
            raise UserError(f"a CLIP tower computes in {' or '.join(_DTYPES)}, not {self.dtype!r}")

    def check_sizes(self, *names: str) -> None:
        """Raise for a field that is below 1."""
        if small := [f"{name} {getattr(self, name)}" for name in names if getattr(self, name) < 1]:
            raise UserError(f"the sizes of a CLIP tower must be at least 1, not {', '.join(small)}")


class States(NamedTuple):
    """What goes from layer to layer: after all of them, their result and the penultimate hidden states."""

    last: Float[Array, "B S E"]
    before: Float[Array, "B S E"]
    """what the last layer was given"""


class ClipLayer(nnx.Module):
    """`x += attention(norm(x))`, `x += mlp(norm(x))`, with biases."""

    def __init__(self, config: ClipTower, *, rngs: nnx.Rngs):
        dtype, width = jnp.dtype(config.dtype), config.width
        self.heads, self.activation = config.heads, config.activation
        self.norm_attention = LayerNorm(width, eps=config.eps)
        self.query, self.key, self.value = (Linear(width, width, dtype=dtype, rngs=rngs) for _ in range(3))
        self.out = Linear(width, width, dtype=dtype, rngs=rngs)
        self.norm_mlp = LayerNorm(width, eps=config.eps)
        self.up = Linear(width, config.mlp_width, dtype=dtype, rngs=rngs)
        self.down = Linear(config.mlp_width, width, dtype=dtype, rngs=rngs)

    def __call__(self, states: States, seen: Bool[Array, "B S S"] | None) -> States:
        """`seen` says which keys each query sees; all of them where it is None."""
        x = states.last
        y = self.norm_attention(x)
        q, k, v = (linear(y).reshape(*x.shape[:2], self.heads, -1) for linear in (self.query, self.key, self.value))
        middle = x + self.out(_attend(q, k, v, seen=seen).reshape(x.shape))
        hidden = self.up(self.norm_mlp(middle))
        return States(last=middle + self.down(_activate(hidden, self.activation)), before=x)


def make_projection(config: ClipTower, *, rngs: nnx.Rngs) -> Linear | None:
    """The map into the space that both towers share."""
    if config.projection is None:
        return None
    return Linear(config.width, config.projection, bias=False, dtype=jnp.dtype(config.dtype), rngs=rngs)


def _activate(x: Float[Array, "B S F"], activation: Activation) -> Float[Array, "B S F"]:
    return x * jax.nn.sigmoid(1.702 * x) if activation == "quick_gelu" else jax.nn.gelu(x, approximate=False)


def _attend(
    q: Float[Array, "B S K d"],
    k: Float[Array, "B S K d"],
    v: Float[Array, "B S K d"],
    *,
    seen: Bool[Array, "B S S"] | None,
) -> Float[Array, "B S K d"]:
    """`softmax(q k^T / sqrt(d)) v`, softmax in float32.

    Not `nn.Attention`, whose patterns are a video's: a text is a few dozen tokens, an image a few hundred.
    """
    scores = jnp.einsum("bnkd,bmkd->bknm", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    if seen is not None:
        scores = jnp.where(seen[:, None], scores, _MASKED)
    return jnp.einsum("bknm,bmkd->bnkd", jax.nn.softmax(scores, axis=-1).astype(v.dtype), v)
