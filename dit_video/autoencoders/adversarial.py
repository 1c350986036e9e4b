"""The game between an autoencoder and a discriminator: what each of them minimises.

Verdicts are positive for original clips. All losses are one value a clip, means over its verdicts.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dit_video.autoencoders.discriminator import Discriminator
from dit_video.core.errors import UserError

Verdicts = Float[Array, "B t h w"]

_LARGEST_WEIGHT = 1e4
_EPSILON = 1e-4
_VERDICTS = (1, 2, 3)
"""The axes of a clip's verdicts."""


@dataclass(frozen=True, kw_only=True)
class R1:
    """The gradient of verdicts on original clips is kept small, on every `every`-th step, `every` times as strongly
    (arXiv 1801.04406, eq. 9; lazily as in arXiv 1912.04958, section 3.1).

    Raises:
      UserError: values out of range.
    """

    weight: float = 10.0
    """gamma"""
    every: int = 16

    def __post_init__(self):
        if not self.weight > 0 or self.every < 1:
            raise UserError(f"R1 needs a positive weight and every >= 1; got weight={self.weight}, every={self.every}")


@dataclass(frozen=True, kw_only=True)
class LeCam:
    """Verdicts are kept near the running mean of those on the other kind of clips (arXiv 2104.03310).

    Raises:
      UserError: values out of range.
    """

    weight: float = 1e-3
    decay: float = 0.99
    """of the running means"""

    def __post_init__(self):
        if not self.weight > 0 or not 0 <= self.decay < 1:
            raise UserError(
                f"LeCam needs a positive weight and a decay in [0, 1); got weight={self.weight}, decay={self.decay}"
            )


@dataclass(frozen=True, kw_only=True)
class Adversarial:
    """A discriminator that an autoencoder is trained against.

    Raises:
      UserError: values out of range.
    """

    weight: float = 0.05
    """of the autoencoder's loss against it, where 1 is as large a gradient as that of the reconstruction"""
    start: int = 0
    """the step from which it is trained and counts: late, as decoded clips are easily told apart at first"""
    learning_rate: float = 1e-4
    regulariser: R1 | LeCam | None = LeCam()
    width: int = 64
    """channels of its first layer"""
    layers: int = 3
    """that halve the resolution: a verdict sees 2^layers pixels and what lies around them"""

    def __post_init__(self):
        if not (self.weight > 0 and self.learning_rate > 0) or self.start < 0:
            raise UserError(
                f"adversarial training needs a positive weight and learning_rate and no negative start; got "
                f"weight={self.weight}, learning_rate={self.learning_rate}, start={self.start}"
            )
        if self.width < 1 or self.layers < 1:
            raise UserError(f"a discriminator of width {self.width} and {self.layers} layers: each is at least 1")

    def make(self, rngs: nnx.Rngs) -> Discriminator:
        return Discriminator(width=self.width, layers=self.layers, rngs=rngs)


def discriminator_loss(real: Verdicts, decoded: Verdicts) -> Float[Array, " B"]:
    """The discriminator's hinge loss (arXiv 1705.02894): `(mean max(0, 1 - D(x)) + mean max(0, 1 + D(y))) / 2`."""
    return 0.5 * (jax.nn.relu(1 - real).mean(axis=_VERDICTS) + jax.nn.relu(1 + decoded).mean(axis=_VERDICTS))


def generator_loss(decoded: Verdicts) -> Float[Array, " B"]:
    """The autoencoder's loss against the discriminator: `-mean D(y)`."""
    return -decoded.mean(axis=_VERDICTS)


def lecam(
    real: Verdicts, decoded: Verdicts, *, real_mean: Float[Array, ""], decoded_mean: Float[Array, ""]
) -> Float[Array, " B"]:
    """`mean max(0, D(x) - a_y)² + mean max(0, a_x - D(y))²` with the running means `a` of the other kind's verdicts.

    arXiv 2104.03310, eq. 5, where the authors' code takes no more than the positive parts (google/lecam-gan).
    """
    return jnp.square(jax.nn.relu(real - decoded_mean)).mean(axis=_VERDICTS) + jnp.square(
        jax.nn.relu(real_mean - decoded)
    ).mean(axis=_VERDICTS)


def r1(judge: Callable[[Array], Verdicts], pixels: Float[Array, "B T H W 3"]) -> Float[Array, " B"]:
    """`|grad_x sum D(x)|² / n` with the number `n` of a clip's verdicts, so that its size does not matter."""
    gradient = jax.grad(lambda clips: judge(clips).sum())(pixels)
    verdicts = jax.eval_shape(judge, pixels)
    return jnp.square(gradient).sum(axis=(1, 2, 3, 4)) * (len(pixels) / verdicts.size)


def adaptive_weight(reconstruction: Float[Array, "..."], against: Float[Array, "..."]) -> Float[Array, ""]:
    """How much larger the reconstruction's gradient is than the one against the discriminator.

        |G_reconstruction| / (|G_against| + 1e-4), at most 10^4

    of the kernel that makes the pixels (arXiv 2012.09841, eq. 7; constants as in CompVis/taming-transformers).
    """
    ratio = jnp.linalg.norm(reconstruction.ravel()) / (jnp.linalg.norm(against.ravel()) + _EPSILON)
    return jax.lax.stop_gradient(jnp.minimum(ratio, _LARGEST_WEIGHT))
