"""A network that tells decoded clips from original ones, patch by patch."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dit_video.nn import CausalConv, RmsNorm

_WIDEST = 8
"""Times the first layer's width."""
_SLOPE = 0.2


class Discriminator(nnx.Module):
    """A 3-D PatchGAN: a verdict on every patch, from what lies around it (arXiv 1611.07004, section 3.2.2).

    `layers` convolutions of 3×4×4, each of which halves the frames (the odd one stays), height and width, then one
    more, then the verdicts. It sees both ways in time, with zeros before and after a clip, so that an image is judged
    as a clip of one frame. Norms are over channels alone: a verdict depends on no other clip, and on no other place
    than those around it.
    """

    def __init__(self, *, width: int, layers: int, rngs: nnx.Rngs):
        widths = [width * min(2**layer, _WIDEST) for layer in range(layers + 1)]
        self.halving = nnx.List(
            [
                CausalConv(before, after, (3, 4, 4), stride=2, rngs=rngs)
                for before, after in zip([3, *widths[:-2]], widths[:-1], strict=True)
            ]
        )
        self.last = CausalConv(widths[-2], widths[-1], (3, 3, 3), rngs=rngs)
        # As in pix2pix the first layer has none: it sees how bright a place is.
        self.norms = nnx.List([RmsNorm(width) for width in widths[1:]])
        self.verdict = CausalConv(widths[-1], 1, (3, 3, 3), rngs=rngs)

    def __call__(self, pixels: Float[Array, "B T H W 3"]) -> Float[Array, "B t h w"]:
        """Verdicts: positive for original, negative for decoded; `ceil(T / 2^layers)` frames of them."""
        x = pixels
        for layer, norm in zip(self.halving, [None, *self.norms[:-1]], strict=True):
            x = layer.valid(_between_zeros(x), step=2)
            x = jax.nn.leaky_relu(x if norm is None else norm(x), _SLOPE)
        x = jax.nn.leaky_relu(self.norms[-1](self.last.valid(_between_zeros(x))), _SLOPE)
        return self.verdict.valid(_between_zeros(x))[..., 0]


def _between_zeros(x: Float[Array, "B t h w i"]) -> Float[Array, "B _ h w i"]:
    """With a frame of zeros at both ends."""
    return jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0)))
