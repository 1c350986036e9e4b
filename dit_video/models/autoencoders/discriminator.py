"""Discriminator of decoded and original clips, patch by patch."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dit_video.nn import CausalConv, RmsNorm

_MAX_WIDTH_FACTOR = 8
"""Maximum width, in multiples of the first layer's."""
_SLOPE = 0.2


class Discriminator(nnx.Module):
    """A 3-D PatchGAN: one logit per patch, which sees the patch and its surroundings (arXiv 1611.07004, 3.2.2).

    `layers` convolutions of 3×4×4, each of which halves frames (rounded up), height and width, then one more
    convolution, then the logits. It sees both directions in time, with zeros before and after a clip, so that an image
    is judged as a clip of one frame. Norms are over channels alone: a logit depends on no other clip and on nothing
    outside its receptive field.
    """

    def __init__(self, *, width: int, layers: int, rngs: nnx.Rngs):
        widths = [width * min(2**layer, _MAX_WIDTH_FACTOR) for layer in range(layers + 1)]
        pairs = zip([3, *widths[:-2]], widths[:-1], strict=True)
        self.halving = nnx.List([CausalConv(*pair, (3, 4, 4), stride=2, rngs=rngs) for pair in pairs])
        self.last = CausalConv(widths[-2], widths[-1], (3, 3, 3), rngs=rngs)
        # As in pix2pix the first layer has no norm: it sees absolute brightness.
        self.norms = nnx.List([RmsNorm(width) for width in widths[1:]])
        self.verdict = CausalConv(widths[-1], 1, (3, 3, 3), rngs=rngs)

    def __call__(self, pixels: Float[Array, "B T H W 3"]) -> Float[Array, "B t h w"]:
        """Return logits, positive for original and negative for decoded clips; `ceil(T / 2^layers)` frames of them."""
        x = pixels
        for layer, norm in zip(self.halving, [None, *self.norms[:-1]], strict=True):
            x = layer.convolve_valid(_pad_time(x), step=2)
            x = jax.nn.leaky_relu(x if norm is None else norm(x), _SLOPE)
        x = jax.nn.leaky_relu(self.norms[-1](self.last.convolve_valid(_pad_time(x))), _SLOPE)
        return self.verdict.convolve_valid(_pad_time(x))[..., 0]


def _pad_time(x: Float[Array, "B t h w i"]) -> Float[Array, "B _ h w i"]:
    """Pad with a frame of zeros at both ends."""
    return jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0)))
