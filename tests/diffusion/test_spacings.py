import numpy as np
import pytest

from dit_video.diffusion.time_schedules import space_values

SPACINGS = ("karras", "exponential", "beta")


@pytest.mark.parametrize("spacing", SPACINGS)
def test_values_fall_between_the_ends(spacing):
    result = space_values(spacing, 14.6, 0.03, 12)
    np.testing.assert_allclose(result[[0, -1]], [14.6, 0.03])
    assert (np.diff(result) < 0).all()
    np.testing.assert_allclose(space_values(spacing, 14.6, 0.03, 1), [14.6])


def test_the_root_the_logarithm_and_the_quantile_are_uniform():
    stats = pytest.importorskip("scipy.stats")
    transforms = (
        lambda x: x ** (1 / 7),
        np.log,
        lambda x: stats.beta.cdf((x - 0.03) / (14.6 - 0.03), 0.6, 0.6),
    )
    for spacing, transform in zip(SPACINGS, transforms, strict=True):
        steps = np.diff(transform(space_values(spacing, 14.6, 0.03, 12)))
        np.testing.assert_allclose(steps, steps.mean(), rtol=1e-6)
