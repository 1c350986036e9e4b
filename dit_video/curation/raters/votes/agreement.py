"""Agreement between raters."""

import numpy as np
from jaxtyping import Float64


def compute_krippendorff_alpha(values: Float64[np.ndarray, "rater unit"], *, is_ordered: bool = True) -> float | None:
    """Return Krippendorff's alpha: 1 if raters agree, 0 if they agree as often as by chance, below 0 if they disagree.

    Source: Krippendorff, "Computing Krippendorff's alpha-reliability" (2011). Raters need not have answered the same
    units. None if no unit has two answers, or if all answers are equal.

    Args:
      values: answers, NaN where a rater has none.
      is_ordered: True for differences of values (interval data), which make a tie half as far from a win as a loss is;
        False for values that are equal or not (nominal data).
    """
    levels = np.unique(values[~np.isnan(values)])
    counts = (values[:, :, None] == levels).sum(axis=0).astype(np.float64)
    answers = counts.sum(axis=1)
    counts, answers = counts[answers > 1], answers[answers > 1]
    if not len(counts):
        return None
    pairs = counts[:, :, None] * counts[:, None] - counts[:, :, None] * np.eye(len(levels))
    observed = (pairs / (answers - 1)[:, None, None]).sum(axis=0)
    totals = observed.sum(axis=1)
    distance = (levels[:, None] - levels) ** 2 if is_ordered else 1 - np.eye(len(levels))
    expected = float((totals[:, None] * totals * distance).sum(axis=(0, 1)))
    if expected == 0:
        return None
    number = float(totals.sum(axis=0))
    return 1 - (number - 1) * float((observed * distance).sum(axis=(0, 1))) / expected
