"""95 % intervals of shares and means."""

from collections.abc import Sequence

import numpy as np
from scipy.special import stdtrit


def compute_wilson_interval(right: int, count: int) -> tuple[float, float]:
    """Return Wilson's interval of a share (1927); (0, 1) if the count is 0."""
    from scipy.stats import binomtest  # slow to import, and needed by few programs that import this module

    if count == 0:
        return 0.0, 1.0
    interval = binomtest(right, count).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def compute_mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return Student's t interval of a mean (1908), exact for independent normal values; None for fewer than two."""
    if len(values) < 2:
        return None
    mean, deviation = float(np.mean(values)), float(np.std(values, ddof=1))
    reach = float(stdtrit(len(values) - 1, 0.975)) * deviation / len(values) ** 0.5
    return mean - reach, mean + reach
