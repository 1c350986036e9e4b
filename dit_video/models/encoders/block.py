"""The transformer block of text encoders that are trained with the denoiser."""

from flax import nnx
from jaxtyping import Array, Float, Int

from dit_video.core.errors import UserError
from dit_video.nn import AttentionInputs, LayerNorm, Linear, gelu, make_attention


class TextBlock(nnx.Module):
    """A pre-norm block of attention within each text and an MLP."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        self.heads = heads
        self.attention = make_attention("auto")
        self.norm_attention, self.norm_mlp = LayerNorm(width), LayerNorm(width)
        self.qkv = Linear(width, 3 * width, rngs=rngs)
        self.out = Linear(width, width, rngs=rngs)
        self.up, self.down = Linear(width, 4 * width, rngs=rngs), Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: Float[Array, "B S E"], segments: Int[Array, "B S"]) -> Float[Array, "B S E"]:
        qkv = self.qkv(self.norm_attention(x)).reshape(*x.shape[:2], 3, self.heads, -1)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        mixed = self.attention(q, k, v, AttentionInputs.self_attention(segments))
        x = x + self.out(mixed.reshape(x.shape))
        return x + self.down(gelu(self.up(self.norm_mlp(x))))


def check_width(width: int, heads: int) -> None:
    """Check the width of an encoder.

    Raises:
      UserError: an odd width, or one not divisible by the heads.
    """
    if heads < 1 or width % heads or width % 2:
        raise UserError(f"width={width}, heads={heads} is invalid: use heads that divide an even width")
