"""The block of the vision transformers that compute features, and the check of their sizes."""

from typing import Any

import jax
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from dit_video.core.errors import UserError, check_at_least
from dit_video.nn import Attention, AttentionInputs, LayerNorm, Linear, make_attention


def check_sizes(config: Any, *pairs: tuple[str, str]) -> None:
    """Check the sizes of a transformer's config, all of whose fields but `eps` are sizes.

    Args:
      config: The config.
      *pairs: Names of a size and of another one that divides it.

    Raises:
      UserError: If a size is below 1, or is not divisible.
    """
    check_at_least(1, **{name: value for name, value in vars(config).items() if name != "eps"})
    for name, divisor in pairs:
        if getattr(config, name) % getattr(config, divisor):
            rule = f"must be divisible by {divisor}={getattr(config, divisor)}"
            raise UserError(f"{name}={getattr(config, name)} is invalid: {rule}. Change one")


class VitBlock(nnx.Module):
    """A pre-norm transformer block: `x += attention(norm(x))`, `x += mlp(norm(x))`.

    Args:
      config: Config with `width`, `heads`, `mlp_width` and `eps`.
      bias: Whether the map to queries, keys and values has a bias.
      rngs: Random keys.
    """

    def __init__(self, config: Any, *, bias: bool = True, rngs: nnx.Rngs):
        width = config.width
        self.heads = config.heads
        self.norm_attention = LayerNorm(width, eps=config.eps)
        self.qkv = Linear(width, 3 * width, bias=bias, rngs=rngs)
        self.out = Linear(width, width, rngs=rngs)
        self.norm_mlp = LayerNorm(width, eps=config.eps)
        self.up = Linear(width, config.mlp_width, rngs=rngs)
        self.down = Linear(config.mlp_width, width, rngs=rngs)
        self.attention: Attention = make_attention()

    def project(self, x: Float[Array, "B N D"]) -> Float[Array, "B N E"]:
        """Return queries, keys and values, one after the other."""
        return self.qkv(x)

    def __call__(self, x: Float[Array, "B N D"], inputs: AttentionInputs) -> Float[Array, "B N D"]:
        q, k, v = rearrange(self.project(self.norm_attention(x)), "B N (s K d) -> s B N K d", s=3, K=self.heads)
        x = x + self.out(rearrange(self.attention(q, k, v, inputs), "B N K d -> B N (K d)"))
        return x + self.down(jax.nn.gelu(self.up(self.norm_mlp(x)), approximate=False))
