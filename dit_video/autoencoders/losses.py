"""What a reconstruction differs by, in several measures; each is one value a clip.

All but LPIPS (`dit_video.features.lpips`) are functions of the error `e = decoded - original` alone, in pixels of
[-1, 1], for their transforms are linear. Every measure is a mean over what it compares, so that clips of all sizes and
lengths weigh the same, and an image is a clip of one frame.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

LOGARITHMIC_FLOOR = 3e-4
_TAPS = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)
"""The binomial filter of Burt and Adelson's pyramid."""
_SMALLEST = 2
"""Pixels of the shorter side below which a pyramid isn't continued."""
_PIXELS = (1, 2, 3, 4)
"""The axes of a clip's values."""
_product = functools.partial(jnp.einsum, precision="highest")


def absolute(error: Float[Array, "B T H W C"]) -> Float[Array, " B"]:
    """`mean |e|`."""
    return jnp.abs(error).mean(axis=_PIXELS)


def squared(error: Float[Array, "B T H W C"]) -> Float[Array, " B"]:
    """`mean e²`."""
    return jnp.square(error).mean(axis=_PIXELS)


def logarithmic(error: Float[Array, "B T H W C"], *, floor: float = LOGARITHMIC_FLOOR) -> Float[Array, " B"]:
    """`floor ln(1 + mean e² / floor)`: decibels, to a factor, where the error is larger than the floor.

    PSNR is a mean over clips of the logarithm of the error, so that a tenth less of it counts the same in a still clip
    as in one that moves much (the loss of arXiv 2105.06086, section 4.2, with a floor under which it is the squared
    error itself). 3e-4 in pixels of [-1, 1] is 41 dB.
    """
    return floor * jnp.log1p(squared(error) / floor)


def charbonnier(error: Float[Array, "B T H W C"], *, epsilon: float = 1e-3) -> Float[Array, " B"]:
    """`mean sqrt(e² + epsilon²)`: the absolute error, smooth at zero (arXiv 1704.03915, eq. 4)."""
    return jnp.sqrt(jnp.square(error) + epsilon**2).mean(axis=_PIXELS)


def pyramid(error: Float[Array, "B T H W C"], *, levels: int = 5) -> Float[Array, " B"]:
    """Absolute error of the levels of a Laplacian pyramid of each frame: what is seen at several distances.

        sum_j mean |L_j|,    L_j = G_j - blur(G_j),    G_0 = e,    G_{j+1} = every second pixel of blur(G_j)

    and the last level is `L = G`. It is Lap_1 of arXiv 1707.05776, section 3 (a level there has the weight 4^j on a sum
    over 4^-j as many values, which makes them equal as means), with the difference from the blurred level itself
    instead of from the next one enlarged. A frame has fewer than `levels` levels where its shorter side ends up at one
    pixel before.
    """
    value, level = jnp.zeros(len(error), error.dtype), error
    for _ in range(levels - 1):
        if min(level.shape[2:4]) < _SMALLEST:
            break
        rows, columns = _blur(level.shape[2]), _blur(level.shape[3])
        blurred = _product("bthwc,gh->btgwc", _product("bthwc,vw->bthvc", level, columns), rows)
        value = value + absolute(level - blurred)
        level = blurred[:, :, ::2, ::2]
    return value + absolute(level)


@functools.cache
def _blur(size: int) -> np.ndarray:
    """The filter as a matrix, beyond whose ends the first and last values go on.

    As products with matrices transforms compile and run several times as fast on CPU as shifted sums do, accelerators
    are made for them, and they are divided over devices.
    """
    matrix = np.zeros((size, size), np.float32)
    for offset, tap in enumerate(_TAPS, -(len(_TAPS) // 2)):
        np.add.at(matrix, (np.arange(size), np.clip(np.arange(size) + offset, 0, size - 1)), tap)
    return matrix


def frequency(error: Float[Array, "B T H W C"], *, focus: float = 1.0) -> Float[Array, " B"]:
    """Squared error of the spectrum of each frame, most of all where it is largest (focal frequency loss).

        mean w |F|²,    F = orthonormal 2-D Fourier transform of a channel of e,    w = (|F| / max |F|)^focus

    without a gradient through `w` (arXiv 2012.12821, eq. 8 and 9). With `focus` 0 it is the squared error, after
    Parseval. A fast transform would not be divided over devices: XLA gathers what it is applied to.
    """
    height, width = error.shape[2:4]
    columns_cos, columns_sin = _waves(width, width // 2 + 1)  # the others are their conjugates
    rows_cos, rows_sin = _waves(height, height)
    real = _product("bthwc,wk->bthkc", error, columns_cos)
    imaginary = -_product("bthwc,wk->bthkc", error, columns_sin)
    along_rows = functools.partial(_product, "bthkc,hl->btlkc")
    power = jnp.square(along_rows(real, rows_cos) + along_rows(imaginary, rows_sin)) + jnp.square(
        along_rows(imaginary, rows_cos) - along_rows(real, rows_sin)
    )
    fixed = jax.lax.stop_gradient(power)
    largest = fixed.max(axis=(2, 3), keepdims=True)
    weight = jnp.power(fixed / jnp.where(largest > 0, largest, 1), focus / 2)
    # The first column, and the middle one of an even width, are their own conjugates; the others stand for two.
    counted = np.array([1 if 2 * k in (0, width) else 2 for k in range(width // 2 + 1)], np.float32)
    return (weight * power * counted[:, None]).sum(axis=3).mean(axis=(1, 2, 3)) / width


def _waves(size: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of the first frequencies, `[x, k]`, so that a transform keeps lengths."""
    angle = 2 * np.pi * (np.outer(np.arange(size), np.arange(count)) % size) / size
    return (np.cos(angle) / np.sqrt(size)).astype(np.float32), (np.sin(angle) / np.sqrt(size)).astype(np.float32)


def temporal(error: Float[Array, "B T H W C"]) -> Float[Array, " B"]:
    """`mean |e_{t+1} - e_t|`: what flickers, or moves otherwise than the original; zero for an image."""
    if error.shape[1] == 1:
        return jnp.zeros(len(error), error.dtype)
    return absolute(error[:, 1:] - error[:, :-1])
