"""Krippendorff's alpha."""

import numpy as np
import pytest

from dit_video.curation.raters.votes.agreement import compute_krippendorff_alpha

NONE = np.nan
EXAMPLE = np.array(
    [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, NONE, NONE, NONE],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NONE, 3],
        [NONE, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NONE],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NONE],
    ]
)
"""Example of Krippendorff (2011) with four raters, twelve units and missing answers."""


@pytest.mark.parametrize(("is_ordered", "alpha"), [(False, 0.743), (True, 0.849)])
def test_the_published_example_has_the_published_alpha(is_ordered, alpha):
    assert compute_krippendorff_alpha(EXAMPLE, is_ordered=is_ordered) == pytest.approx(alpha, abs=5e-4)


def test_equal_answers_agree_and_random_ones_do_not():
    generator = np.random.default_rng(0)
    answers = generator.choice([0, 0.5, 1], (3, 4000))
    assert compute_krippendorff_alpha(np.repeat(answers[:1], 3, axis=0)) == pytest.approx(1)
    assert compute_krippendorff_alpha(answers) == pytest.approx(0, abs=0.03)
    assert compute_krippendorff_alpha(np.stack([answers[0], 1 - answers[0]])) < -0.9


def test_a_tie_against_a_win_is_a_smaller_disagreement_than_a_loss_against_a_win():
    close = np.array([[1, 0, 1, 0.5], [1, 0, 0.5, 0]])
    far = np.array([[1.0, 0, 1, 1], [1, 0, 0, 0]])
    assert compute_krippendorff_alpha(close) > compute_krippendorff_alpha(far)


def test_without_two_answers_on_a_unit_or_two_values_there_is_no_alpha():
    assert compute_krippendorff_alpha(np.array([[1, NONE], [NONE, 0]])) is None
    assert compute_krippendorff_alpha(np.ones((2, 3))) is None
    assert compute_krippendorff_alpha(np.empty((0, 3))) is None
