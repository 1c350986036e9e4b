"""The loss that an autoencoder is trained with, as a weighted sum."""

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dit_video.core.errors import UserError, check_at_least
from dit_video.models.autoencoders.adversarial import AdversarialConfig
from dit_video.models.autoencoders.codebook import CodebookLearning
from dit_video.models.autoencoders.interface import Pixels

LOG_FLOOR = 3e-4
_TAPS = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)
"""Binomial filter of Burt and Adelson's pyramid."""
_MIN_SIDE = 2
"""Shorter side in pixels below which a pyramid is not continued."""
_VALUE_AXES = (1, 2, 3, 4)
"""Axes of a clip's values."""
_einsum = functools.partial(jnp.einsum, precision="highest")


def absolute_error(error: Float[Array, "B T H W C"]) -> Float[Array, " B"]:
    """Return `mean |e|`."""
    return jnp.abs(error).mean(axis=_VALUE_AXES)


def squared_error(error: Float[Array, "B T H W C"]) -> Float[Array, " B"]:
    """Return `mean e²`."""
    return jnp.square(error).mean(axis=_VALUE_AXES)


def log_squared_error(error: Float[Array, "B T H W C"], *, floor: float = LOG_FLOOR) -> Float[Array, " B"]:
    """Return `floor ln(1 + mean e² / floor)`: proportional to decibels where the error exceeds the floor.

    Mean PSNR averages the logarithm of each clip's error, so that reducing it by a tenth counts the same in a still
    clip as in one with much motion (the loss of arXiv 2105.06086, section 4.2, with a floor below which it is the
    squared error itself). 3e-4 in pixels of [-1, 1] is 41 dB.
    """
    return floor * jnp.log1p(squared_error(error) / floor)


def charbonnier_loss(error: Float[Array, "B T H W C"], *, epsilon: float = 1e-3) -> Float[Array, " B"]:
    """Return `mean sqrt(e² + epsilon²)`: the absolute error, smooth at zero (arXiv 1704.03915, eq. 4)."""
    return jnp.sqrt(jnp.square(error) + epsilon**2).mean(axis=_VALUE_AXES)


def pyramid_loss(error: Float[Array, "B T H W C"], *, levels: int = 5) -> Float[Array, " B"]:
    """Return the absolute error over the levels of each frame's Laplacian pyramid: errors at several scales.

        sum_j mean |L_j|,    L_j = G_j - blur(G_j),    G_0 = e,    G_{j+1} = every second pixel of blur(G_j)

    and the last level is `L = G`. It is Lap_1 of arXiv 1707.05776, section 3 (a level there has the weight 4^j on a sum
    over 4^-j as many values, which makes the levels equal as means), with the difference from the blurred level itself
    instead of from the enlarged next one. A frame has fewer than `levels` levels if its shorter side reaches one pixel
    earlier.
    """
    value, level = jnp.zeros(len(error), error.dtype), error
    for _ in range(levels - 1):
        if min(level.shape[2:4]) < _MIN_SIDE:
            break
        rows, columns = _make_blur_matrix(level.shape[2]), _make_blur_matrix(level.shape[3])
        blurred = _einsum("bthwc,gh->btgwc", _einsum("bthwc,vw->bthvc", level, columns), rows)
        value = value + absolute_error(level - blurred)
        level = blurred[:, :, ::2, ::2]
    return value + absolute_error(level)


@functools.cache
def _make_blur_matrix(size: int) -> np.ndarray:
    """Return the filter as a matrix that repeats the first and last values beyond the ends.

    Matrix products compile and run several times as fast on CPU as shifted sums, accelerators are built for them, and
    they can be sharded over devices.
    """
    matrix = np.zeros((size, size), np.float32)
    for offset, tap in enumerate(_TAPS, -(len(_TAPS) // 2)):
        np.add.at(matrix, (np.arange(size), np.clip(np.arange(size) + offset, 0, size - 1)), tap)
    return matrix


def frequency_loss(error: Float[Array, "B T H W C"], *, focus: float = 1.0) -> Float[Array, " B"]:
    """Return the squared error of each frame's spectrum, weighted to its largest values (focal frequency loss).

        mean w |F|²,    F = orthonormal 2-D Fourier transform of a channel of e,    w = (|F| / max |F|)^focus

    without a gradient through `w` (arXiv 2012.12821, eq. 8 and 9). With `focus` 0 it is the squared error, by
    Parseval's theorem. An FFT would not be sharded over devices: XLA gathers its input.
    """
    height, width = error.shape[2:4]
    columns_cos, columns_sin = _make_fourier_matrices(width, width // 2 + 1)  # the other columns are their conjugates
    rows_cos, rows_sin = _make_fourier_matrices(height, height)
    real = _einsum("bthwc,wk->bthkc", error, columns_cos)
    imaginary = -_einsum("bthwc,wk->bthkc", error, columns_sin)
    along_rows = functools.partial(_einsum, "bthkc,hl->btlkc")
    power = jnp.square(along_rows(real, rows_cos) + along_rows(imaginary, rows_sin))
    power += jnp.square(along_rows(imaginary, rows_cos) - along_rows(real, rows_sin))
    fixed = jax.lax.stop_gradient(power)
    largest = fixed.max(axis=(2, 3), keepdims=True)
    weight = jnp.power(fixed / jnp.where(largest > 0, largest, 1), focus / 2)
    # The first column, and the middle one of an even width, are their own conjugates; the others count twice.
    counts = np.array([1 if 2 * k in (0, width) else 2 for k in range(width // 2 + 1)], np.float32)
    return (weight * power * counts[:, None]).sum(axis=3).mean(axis=(1, 2, 3)) / width


def _make_fourier_matrices(size: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return cosines and sines of the first frequencies, `[x, k]`, scaled so that the transform keeps norms."""
    angle = 2 * np.pi * (np.outer(np.arange(size), np.arange(count)) % size) / size
    return (np.cos(angle) / np.sqrt(size)).astype(np.float32), (np.sin(angle) / np.sqrt(size)).astype(np.float32)


def temporal_loss(error: Float[Array, "B T H W C"]) -> Float[Array, " B"]:
    """Return `mean |e_{t+1} - e_t|`: flicker, and motion that differs from the original's; zero for an image."""
    if error.shape[1] == 1:
        return jnp.zeros(len(error), error.dtype)
    return absolute_error(error[:, 1:] - error[:, :-1])


def gradient_loss(error: Float[Array, "B T H W C"]) -> Float[Array, " B"]:
    """Return the mean squared difference of neighbouring errors, summed over time, rows and columns.

        mean (e_{t+1} - e_t)² + mean (e_{h+1} - e_h)² + mean (e_{w+1} - e_w)²

    With `squared` it is a Sobolev norm. Errors that jump from the pixels of one latent to those of the next cost more
    than smooth ones of the same size, so that borders of patches show less, in space and in time.
    """
    value = jnp.zeros(len(error), error.dtype)
    for axis in (1, 2, 3):
        if error.shape[axis] > 1:
            value = value + squared_error(jnp.diff(error, axis=axis))
    return value


PerceptualNet = Callable[[Pixels, Pixels], Float[Array, " B"]]
"""Distance between decoded and original clips measured by a network, such as LPIPS."""

_ERROR_LOSSES = {
    "squared": squared_error,
    "logarithmic": log_squared_error,
    "absolute": absolute_error,
    "charbonnier": charbonnier_loss,
    "pyramid": pyramid_loss,
    "frequency": frequency_loss,
    "temporal": temporal_loss,
    "gradient": gradient_loss,
}


@dataclass(frozen=True, kw_only=True)
class AutoencoderObjective:
    """Weights of the terms of the loss; a term of weight 0 is not computed.

    The default is the absolute error with three terms that need no other network's weights: where errors are
    (`pyramid`: edges and areas count, not only single pixels), at which frequencies (`frequency`), and whether they
    flicker (`temporal`). See `dit_video.models.autoencoders.objective` for the equations.

    Raises:
      UserError: If a weight is negative, no term compares pixels, or LPIPS lacks its weights.
    """

    squared: float = 0.0
    """Weight of the squared error."""
    logarithmic: float = 0.0
    """Weight of the logarithm of each clip's squared error, which mean PSNR rewards."""
    absolute: float = 1.0
    """Weight of the absolute error."""
    charbonnier: float = 0.0
    """Weight of the Charbonnier loss."""
    pyramid: float = 0.5
    """Weight of the Laplacian pyramid loss."""
    frequency: float = 1.0
    """Weight of the focal frequency loss."""
    temporal: float = 0.5
    """Weight of the error of frame differences."""
    gradient: float = 0.0
    """Weight of the squared error of differences between neighbours in space and time, against visible patches."""
    lpips: float = 0.0
    """Weight of LPIPS, the learned distance of arXiv 1801.03924; 0.5 is common."""
    lpips_weights: str | None = None
    """File of LPIPS' weights; `dit_video.weights.load_lpips` says how to make it."""
    kl: float = 1e-6
    """Weight of the latents' divergence from a standard normal, in nats per latent position; codes have none."""
    codebook: CodebookLearning = field(default_factory=CodebookLearning)
    """Learning of the codebook, for an autoencoder that has one."""
    adversarial: AdversarialConfig | None = None
    """Discriminator that the autoencoder is trained against, if any."""

    def __post_init__(self):
        parts = (*_ERROR_LOSSES, "lpips")
        check_at_least(0, **{name: getattr(self, name) for name in (*parts, "kl")})
        if not any(getattr(self, name) for name in parts):
            raise UserError(f"the autoencoder's loss compares no pixels; give one of {', '.join(parts)} a weight")
        if (self.lpips > 0) != (self.lpips_weights is not None):
            raise UserError(
                f"lpips={self.lpips}, lpips_weights={self.lpips_weights} is invalid: use both or neither; "
                "dit_video.weights.load_lpips says how to make the file"
            )

    @classmethod
    def pixels(cls, *, kl: float = 1e-4) -> "AutoencoderObjective":
        """Return the squared error plus a tenth of the absolute one: the fastest loss, and good for PSNR."""
        return cls(squared=1.0, absolute=0.1, pyramid=0.0, frequency=0.0, temporal=0.0, kl=kl)

    def compare(
        self, decoded: Pixels, original: Pixels, perceptual_net: PerceptualNet | None = None
    ) -> tuple[Float[Array, " B"], dict[str, Float[Array, " B"]]]:
        """Return the weighted sum of the reconstruction terms, and the terms by name.

        Args:
          decoded: Pixels, approximately in [-1, 1].
          original: Pixels in [-1, 1].
          perceptual_net: LPIPS, required if it has a weight.
        """
        error = decoded - original
        parts = {name: measure(error) for name, measure in _ERROR_LOSSES.items() if getattr(self, name)}
        if self.lpips:
            if perceptual_net is None:
                raise ValueError(f"lpips={self.lpips} needs a network; pass perceptual_net")
            parts["lpips"] = perceptual_net(decoded, original)
        weighted = [getattr(self, name) * value for name, value in parts.items()]
        return functools.reduce(operator.add, weighted), parts
