"""Adversarial training of an autoencoder: configuration, losses of both networks and their regularisers.

The discriminator's logits are positive for original clips. All losses are one value per clip, means over its logits.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dit_video.core.errors import UserError, check_at_least
from dit_video.models.autoencoders.discriminator import Discriminator
from dit_video.models.autoencoders.interface import Pixels

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
      UserError: values out of range.
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
    """LeCam regulariser: keeps logits near the running mean of the other kind of clips' (arXiv 2104.03310).

    Raises:
      UserError: values out of range.
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
      UserError: values out of range.
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
        if not (self.weight > 0 and self.learning_rate > 0) or self.start_step < 0:
            raise UserError(f"{self} is invalid: use a positive weight and learning_rate, and start_step >= 0")
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
