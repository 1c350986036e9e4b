"""C3D, fine-tuned on UCF-101: the classifier of the inception score of videos (arXiv 1412.0767 and 1611.06624).

The reference is the network of TGAN's authors (`C3DVersion1UCF101` of pfnet-research/tgan2), which is Caffe's: colours
are blue, green and red, values lie in 0..255 less the mean of its training clips at each pixel, and pools have a last
window that is partly outside.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dit_video.core.errors import UserError
from dit_video.models.features.conv_unit import ConvUnit, Extent, pool_max
from dit_video.nn import Linear
from dit_video.tokens import Grid

CLASSES = 101
SIZE = Grid(16, 112, 112)
"""Frames, height and width of its clips."""
CONVOLUTIONS: dict[str, int] = {
    "conv1a": 64,
    "conv2a": 128,
    "conv3a": 256,
    "conv3b": 256,
    "conv4a": 512,
    "conv4b": 512,
    "conv5a": 512,
    "conv5b": 512,
}
"""Channels of the convolutions by their names in Caffe."""
_POOLS: dict[str, Extent] = {"conv1a": (1, 2, 2)} | dict.fromkeys(("conv2a", "conv3b", "conv4b", "conv5b"), (2, 2, 2))
"""Windows of the pools after some convolutions."""
_HIDDEN = 4096


class C3d(nnx.Module):
    """The logits of UCF-101's classes.

    Args:
      rngs: random keys of the initial parameters, which are to be replaced by loaded ones.
    """

    def __init__(self, *, rngs: nnx.Rngs):
        width, convolutions = 3, {}
        for name, width_out in CONVOLUTIONS.items():
            convolutions[name] = ConvUnit(width, width_out, (3, 3, 3), eps=None, rngs=rngs)
            width = width_out
        self.convolutions = nnx.Dict(convolutions)
        self.fc6 = Linear(width * 4 * 4, _HIDDEN, rngs=rngs)
        self.fc7 = Linear(_HIDDEN, _HIDDEN, rngs=rngs)
        self.fc8 = Linear(_HIDDEN, CLASSES, rngs=rngs)
        self.mean = nnx.Param(jnp.zeros((*SIZE, 3), jnp.float32))

    def __call__(self, pixels: Float[Array, "B 16 112 112 3"]) -> Float[Array, "B 101"]:
        """Return the logits of clips in [-1, 1], red first.

        Raises:
          UserError: another size.
        """
        size = Grid(*pixels.shape[1:4])
        if size != SIZE:
            raise UserError(f"clips of {size} are invalid: C3D reads {SIZE}. Resize them")
        x = 128 * (pixels[..., ::-1] + 1) - self.mean[...]
        for name, convolution in self.convolutions.items():
            x = convolution(x)
            if name in _POOLS:
                x = pool_max(x, _POOLS[name], stride=_POOLS[name])
        # Caffe's order of values is that of channels, rows and columns.
        x = jnp.moveaxis(x[:, 0], -1, 1).reshape(len(x), -1)
        return self.fc8(jax.nn.relu(self.fc7(jax.nn.relu(self.fc6(x)))))
