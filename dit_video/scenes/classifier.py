"""A small classifier of rendered scenes, whose features measure distances between sets of clips without downloads."""

import itertools
from collections.abc import Sequence

import einops
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dit_video.core.errors import UserError
from dit_video.nn import Linear

SIDE = 48
"""Height and width of its clips in pixels."""
PATCH = 4
WIDTHS = (32, 48, 64, 96)
"""Channels of the embedding of patches and of the convolutions."""
_STRIDES = ((2, 2, 2), (2, 1, 1), (2, 2, 2))


class SceneClassifier(nnx.Module):
    """Convolutions over patches of frames, whose mean over all positions is the feature, and one logit for each label.

    Args:
      labels: number of labels.
      widths: channels of the embedding of patches and of the convolutions.
      rngs: random keys of the initial parameters.
    """

    def __init__(self, labels: int, *, widths: Sequence[int] = WIDTHS, rngs: nnx.Rngs):
        self.embedding = Linear(3 * PATCH**2, widths[0], rngs=rngs)
        self.convolutions = nnx.List(
            [Linear(27 * width_in, width, rngs=rngs) for width_in, width in itertools.pairwise(widths)]
        )
        self.head = Linear(widths[-1], labels, rngs=rngs)

    def __call__(self, pixels: Float[Array, "B T H W 3"]) -> Float[Array, "B D"]:
        """Return the features of clips of 48×48 pixels in [-1, 1], of any number of frames.

        Raises:
          UserError: another size.
        """
        if pixels.shape[2:4] != (SIDE, SIDE):
            height, width = pixels.shape[2:4]
            raise UserError(f"frames of {height}x{width} are invalid: the classifier reads {SIDE}x{SIDE}. Resize them")
        patches = einops.rearrange(pixels, "B T (h p) (w q) c -> B T h w (p q c)", p=PATCH, q=PATCH)
        x = jax.nn.gelu(self.embedding(patches))
        for convolution, stride in zip(self.convolutions, _STRIDES, strict=True):
            x = jax.nn.gelu(convolution(_stack_neighbours(x, stride)))
        return jnp.mean(x, axis=(1, 2, 3))

    def classify(self, features: Float[Array, "B D"]) -> Float[Array, "B L"]:
        """Return the logits of the labels, each of which may be true."""
        return self.head(features)


def _stack_neighbours(x: Float[Array, "B t h w i"], stride: tuple[int, int, int]) -> Float[Array, "B _ _ _ o"]:
    """Return the values at the 3×3×3 positions around every one, zero outside.

    A matrix product of them is a convolution, whose gradient XLA computes ten times faster so on CPU.
    """
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (1, 1), (0, 0)))
    frames, height, width = x.shape[1:4]
    shifts = itertools.product(range(3), repeat=3)
    t, h, w = stride
    return jnp.concatenate(
        [padded[:, a : a + frames : t, b : b + height : h, c : c + width : w] for a, b, c in shifts], axis=-1
    )


def compute_label_loss(logits: Float[Array, "B L"], labels: Float[Array, "B L"]) -> Float[Array, " B"]:
    """Return the binary cross-entropy of each clip's labels, in nats, summed over them."""
    return (jax.nn.softplus(logits) - labels * logits).sum(axis=-1)
