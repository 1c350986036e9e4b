"""Adversarial training of an autoencoder: configuration, losses of both networks and their regularisers.

The discriminator's logits are positive for original clips. All losses are one value per clip, means over its logits.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dit_video.core.errors import UserError, check_at_least
from dit_video.models.autoencoders.interface import Pixels
from dit_video.nn import CausalConv, RmsNorm

_MAX_WIDTH_FACTOR = 8
"""Maximum width, in multiples of the first layer's."""
_SLOPE = 0.2


class Discriminator(nnx.Module):
    """A 3-D PatchGAN: one logit per patch, which sees the patch and its surroundings (arXiv 1611.07004, 3.2.2).

    It has `layers` convolutions of 3×4×4, each halving frames (rounded up), height and width, then one more
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


Logits = Float[Array, "B t h w"]

_MAX_WEIGHT = 1e4
_EPSILON = 1e-4
_LOGIT_AXES = (1, 2, 3)
"""Axes of a clip's logits."""


@dataclass(frozen=True, kw_only=True)
class R1:
    """R1 gradient penalty on original clips, on every `every`-th step with `every` times the weight.

    arXiv 1801.04406, eq. 9; lazy as in arXiv 1912.04958, section 3.1.

    Raises:
      UserError: If a value is out of range.
    """

    weight: float = 10.0
    """Weight gamma of the penalty."""
    every: int = 16
    """Steps from one evaluation of the penalty to the next."""

    def __post_init__(self):
        if not self.weight > 0 or self.every < 1:
            raise UserError(f"{self} is invalid: use weight > 0 and every >= 1")


@dataclass(frozen=True, kw_only=True)
class LeCam:
    """LeCam regulariser: keeps logits near the running mean for the other kind of clips (arXiv 2104.03310).

    Raises:
      UserError: If a value is out of range.
    """

    weight: float = 1e-3
    """Weight of the regulariser."""
    decay: float = 0.99
    """Decay of the running means, per step."""

    def __post_init__(self):
        if not self.weight > 0 or not 0 <= self.decay < 1:
            raise UserError(f"{self} is invalid: use weight > 0 and a decay in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class AdversarialConfig:
    """Configuration of the discriminator that an autoencoder is trained against.

    Raises:
      UserError: If a value is out of range.
    """

    weight: float = 0.05
    """Weight of the generator loss, relative to a gradient as large as the reconstruction's."""
    start_step: int = 0
    """First step that trains and counts the discriminator: late, as decoded clips are easy to recognise at first."""
    learning_rate: float = 1e-4
    """Learning rate of the discriminator."""
    regulariser: R1 | LeCam | None = LeCam()
    width: int = 64
    """Channels of the first layer."""
    layers: int = 3
    """Number of layers that halve the resolution: a logit sees 2^layers pixels and their surroundings."""

    def __post_init__(self):
        if not (self.weight > 0 and 0 < self.learning_rate < math.inf) or self.start_step < 0:
            raise UserError(f"{self} is invalid: use weight > 0, a finite learning_rate > 0 and start_step >= 0")
        check_at_least(1, width=self.width, layers=self.layers)

    def make(self, rngs: nnx.Rngs) -> Discriminator:
        """Return a new discriminator."""
        return Discriminator(width=self.width, layers=self.layers, rngs=rngs)


def discriminator_loss(logits_real: Logits, logits_fake: Logits) -> Float[Array, " B"]:
    """Return the hinge loss (arXiv 1705.02894): `(mean max(0, 1 - D(x)) + mean max(0, 1 + D(y))) / 2`."""
    real, fake = jax.nn.relu(1 - logits_real), jax.nn.relu(1 + logits_fake)
    return 0.5 * (real.mean(axis=_LOGIT_AXES) + fake.mean(axis=_LOGIT_AXES))


def generator_loss(logits_fake: Logits) -> Float[Array, " B"]:
    """Return the autoencoder's loss against the discriminator: `-mean D(y)`."""
    return -logits_fake.mean(axis=_LOGIT_AXES)


def lecam_loss(
    logits_real: Logits, logits_fake: Logits, *, real_mean: Float[Array, ""], fake_mean: Float[Array, ""]
) -> Float[Array, " B"]:
    """Return `mean max(0, D(x) - a_y)² + mean max(0, a_x - D(y))²` with the running means `a` of the logits.

    arXiv 2104.03310, eq. 5, restricted to the positive parts as in the authors' code (google/lecam-gan).
    """
    real, fake = jax.nn.relu(logits_real - fake_mean), jax.nn.relu(real_mean - logits_fake)
    return jnp.square(real).mean(axis=_LOGIT_AXES) + jnp.square(fake).mean(axis=_LOGIT_AXES)


def r1_penalty(discriminator: Callable[[Array], Logits], pixels: Pixels) -> Float[Array, " B"]:
    """Return `|grad_x sum D(x)|² / n`; dividing by the `n` logits of a clip makes it independent of the clip's size."""
    gradient = jax.grad(lambda clips: discriminator(clips).sum())(pixels)
    verdicts = jax.eval_shape(discriminator, pixels)
    return jnp.square(gradient).sum(axis=(1, 2, 3, 4)) * (len(pixels) / verdicts.size)


def compute_adaptive_weight(
    reconstruction_grad: Float[Array, "..."], adversarial_grad: Float[Array, "..."]
) -> Float[Array, ""]:
    """Return the ratio of the reconstruction's gradient norm to the adversarial one.

        |G_reconstruction| / (|G_adversarial| + 1e-4), at most 10^4

    Both are gradients of the kernel that makes the pixels (arXiv 2012.09841, eq. 7; constants as in
    CompVis/taming-transformers).
    """
    ratio = jnp.linalg.norm(reconstruction_grad.ravel()) / (jnp.linalg.norm(adversarial_grad.ravel()) + _EPSILON)
    return jax.lax.stop_gradient(jnp.minimum(ratio, _MAX_WEIGHT))
