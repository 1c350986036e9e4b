"""Spacings of falling values, such as ratios of noise to data, between two ends."""

from typing import Literal

import numpy as np
from jaxtyping import Float64

Spacing = Literal["karras", "exponential", "beta"]


def space_values(
    spacing: Spacing, first: float, last: float, count: int, *, exponent: float = 7.0, concentration: float = 0.6
) -> Float64[np.ndarray, " {count}"]:
    r"""Return `count` values from `first` to `last`.

    Args:
      spacing: Uniform in the root of order `exponent` (`karras`, arXiv 2206.00364, eq. 5), in the logarithm
        (`exponential`), or at quantiles of the symmetric beta distribution (`beta`, arXiv 2407.12173), which are dense
        at both ends.
      first: First value.
      last: Last value.
      count: Number of values.
      exponent: Order of the root, of `karras`.
      concentration: Both parameters of the distribution, of `beta`.
    """
    if spacing == "karras":
        return np.linspace(first ** (1 / exponent), last ** (1 / exponent), count) ** exponent
    if spacing == "exponential":
        return np.exp(np.linspace(np.log(first), np.log(last), count))
    from scipy.stats import beta  # slow to import, and rarely needed

    quantiles: np.ndarray = beta.ppf(1 - np.linspace(0.0, 1.0, count), concentration, concentration)
    return last + quantiles * (first - last)
