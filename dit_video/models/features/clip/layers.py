"""Shared parts of CLIP's two towers: their configuration and pre-norm transformer layers."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from dit_video.core.errors import UserError, check_at_least
from dit_video.nn import LayerNorm, Linear

Activation = Literal["quick_gelu", "gelu"]
"""Activation of the MLPs: `x sigmoid(1.702 x)` in OpenAI's models, exact gelu (error function) in OpenCLIP's."""
ACTIVATIONS: tuple[Activation, ...] = ("quick_gelu", "gelu")
_DTYPES = ("float32", "bfloat16")
# Not -inf: the softmax of a fully masked row would be NaN.
_MASKED = -1e30


@dataclass(frozen=True, kw_only=True)
class ClipTowerConfig:
    """Configuration common to both towers.

    Raises:
      UserError: a size below 1, heads that do not divide the width, or another dtype.
    """

    width: int
    layers: int
    heads: int
    mlp_width: int
    activation: Activation = "quick_gelu"
    eps: float = 1e-5
    """Epsilon of layer norms."""
    projection: int | None = None
    """Width of the space in which texts and images are compared; None for a tower without a map to it."""
    dtype: str = "float32"
    """Dtype of matrix products, float32 or bfloat16; norms, softmax and the residual stream are float32."""

    def __post_init__(self):
        check_at_least(1, width=self.width, layers=self.layers, heads=self.heads)
        check_at_least(1, mlp_width=self.mlp_width, projection=self.projection)
        if self.width % self.heads:
            raise UserError(f"width={self.width} is invalid: must be divisible by heads={self.heads}. Change one")
        if self.dtype not in _DTYPES:
            raise UserError(f"dtype={self.dtype!r} of a CLIP tower is invalid: use {' or '.join(_DTYPES)}")


class LayerStates(NamedTuple):
    """Values passed from layer to layer: the hidden states, and those before the last layer."""

    hidden: Float[Array, "B S E"]
    penultimate: Float[Array, "B S E"]
    """Input of the last layer: the penultimate hidden states."""


class ClipFeatures(NamedTuple):
    """Features of texts or images from their tower; an image's first token is the class token, for the whole image."""

    values: Float[Array, "B S E"]
    """Features of every token: of texts after the last norm, of images without a norm."""
    penultimate: Float[Array, "B S E"]
    """Penultimate hidden states, the input of the last layer: the image tokens of Wan's image-to-video."""
    pooled: Float[Array, "B E"]
    """Element of `values` at a text's end token, or an image's first one after a norm."""
    projected: Float[Array, "B P"] | None
    """Projection of `pooled` to the space shared by both towers; None for a tower without a map to it."""


class ClipLayer(nnx.Module):
    """A pre-norm transformer layer with biases: `x += attention(norm(x))`, `x += mlp(norm(x))`."""

    def __init__(self, config: ClipTowerConfig, *, rngs: nnx.Rngs):
        dtype, width = jnp.dtype(config.dtype), config.width
        self.heads, self.activation = config.heads, config.activation
        self.norm_attention = LayerNorm(width, eps=config.eps)
        self.query, self.key, self.value = (Linear(width, width, dtype=dtype, rngs=rngs) for _ in range(3))
        self.out = Linear(width, width, dtype=dtype, rngs=rngs)
        self.norm_mlp = LayerNorm(width, eps=config.eps)
        self.up = Linear(width, config.mlp_width, dtype=dtype, rngs=rngs)
        self.down = Linear(config.mlp_width, width, dtype=dtype, rngs=rngs)

    def __call__(self, states: LayerStates, mask: Bool[Array, "B S S"] | None) -> LayerStates:
        """Apply the layer; `mask` is true for the keys that each query sees, None if it sees all."""
        x = states.hidden
        y = self.norm_attention(x)
        q, k, v = (linear(y).reshape(*x.shape[:2], self.heads, -1) for linear in (self.query, self.key, self.value))
        attended = x + self.out(_attend(q, k, v, mask=mask).reshape(x.shape))
        x_up = self.up(self.norm_mlp(attended))
        quick = self.activation == "quick_gelu"
        hidden = x_up * jax.nn.sigmoid(1.702 * x_up) if quick else jax.nn.gelu(x_up, approximate=False)
        return LayerStates(hidden=attended + self.down(hidden), penultimate=x)


def make_projection(config: ClipTowerConfig, *, rngs: nnx.Rngs) -> Linear | None:
    """Return the map into the space that both towers share, or None for a tower without one."""
    if config.projection is None:
        return None
    return Linear(config.width, config.projection, bias=False, dtype=jnp.dtype(config.dtype), rngs=rngs)


_Heads = Float[Array, "B S K d"]


def _attend(q: _Heads, k: _Heads, v: _Heads, *, mask: Bool[Array, "B S S"] | None) -> _Heads:
    """Return `softmax(q k^T / sqrt(d)) v`, with the softmax in float32.

    Not `nn.Attention`, which is for the patterns of videos: a text is a few dozen tokens, an image a few hundred.
    """
    scores = jnp.einsum("bnkd,bmkd->bknm", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = jnp.where(mask[:, None], scores, _MASKED)
    return jnp.einsum("bknm,bmkd->bnkd", jax.nn.softmax(scores, axis=-1).astype(v.dtype), v)
