import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dit_video.core.errors import UserError
from dit_video.diffusion import (
    Edm,
    LogitNormal,
    LogNormalSigma,
    Mode,
    RectifiedFlow,
    Uniform,
    VariancePreservingProcess,
    draw_low_discrepancy,
)

OFFSET = jnp.asarray(0.3)


@pytest.mark.parametrize("start", [0, 123_457, 2**32 - 1000])
def test_consecutive_ranks_cover_the_unit_interval_evenly(start):
    ranks = jnp.asarray(np.arange(start, start + 1000, dtype=np.uint64) % 2**32, jnp.uint32)
    numbers = np.sort(draw_low_discrepancy(OFFSET, ranks))
    assert numbers[0] >= 0
    assert numbers[-1] < 1
    # The three-gap theorem: distances of n points take three values, the largest below 2.7 / n. Of independent draws
    # it would be about 7 / n.
    gaps = np.diff(np.concatenate([numbers, [numbers[0] + 1]]))
    assert gaps.max() < 2.7 / 1000
    assert gaps.min() > 0.3 / 1000


def test_a_small_batch_is_even_too():
    numbers = np.sort(draw_low_discrepancy(OFFSET, jnp.arange(8, dtype=jnp.uint32)))
    assert stats.kstest(numbers, "uniform").statistic < 0.2


def test_a_number_belongs_to_the_rank_and_not_to_the_batch():
    ranks = jnp.asarray([2**32 - 1, 7, 2**31, 0, 2**24 + 1], jnp.uint32)
    whole = draw_low_discrepancy(OFFSET, ranks)
    one_by_one = [draw_low_discrepancy(OFFSET, rank) for rank in ranks]
    np.testing.assert_array_equal(whole, one_by_one)
    np.testing.assert_array_equal(draw_low_discrepancy(OFFSET, ranks[::-1].reshape(5, 1))[::-1, 0], whole)


def test_large_ranks_keep_their_fraction():
    for rank in (2**24 + 1, 2**31 + 5, 2**32 - 1):
        exact = (0.25 + rank * int(0.6180339887498949 * 2**32) % 2**32 / 2**32) % 1
        result = draw_low_discrepancy(jnp.asarray(0.25), jnp.asarray(rank, jnp.uint32))
        assert result == pytest.approx(exact, abs=1e-6)


def test_the_offset_moves_all_numbers_around_the_circle():
    ranks = jnp.arange(50, dtype=jnp.uint32)
    moved = draw_low_discrepancy(jnp.asarray(0.999), ranks) - draw_low_discrepancy(jnp.asarray(0.0), ranks)
    np.testing.assert_allclose(np.asarray(moved) % 1, 0.999, atol=1e-6)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 0.7), (1.2, 2.0)])
def test_logit_normal_times_have_the_right_quantiles(mean, std):
    u = np.linspace(0.001, 0.999, 201)
    expected = 1 / (1 + np.exp(-stats.norm.ppf(u, loc=mean, scale=std)))
    result = LogitNormal(mean=mean, std=std).quantile(jnp.asarray(u, jnp.float32))
    np.testing.assert_allclose(result, expected, atol=1e-5)


def test_quantiles_at_the_ends_are_finite_times():
    for times in (LogitNormal(), LogitNormal(mean=3.0, std=2.0), Uniform(), Mode(scale=-1.0), Mode(scale=1.75)):
        result = times.quantile(jnp.asarray([0.0, 1.0 - 2**-24]))
        assert 0 <= result[0] < result[1] <= 1


def test_logit_normal_times_lie_in_the_middle():
    u = draw_low_discrepancy(OFFSET, jnp.arange(1000, dtype=jnp.uint32))
    times = jax.jit(LogitNormal().quantile)(u)
    assert np.mean((times > 0.25) & (times < 0.75)) == pytest.approx(2 * stats.norm.cdf(np.log(3)) - 1, abs=0.01)


@pytest.mark.parametrize("std", [0.0, -1.0, float("nan")])
def test_a_deviation_that_is_not_positive_is_refused(std):
    with pytest.raises(UserError, match="must be positive"):
        LogitNormal(std=std)


@pytest.mark.parametrize("scale", [-1.0, -0.3, 0.0, 1.29, 1.75])
def test_mode_times_follow_the_papers_equation(scale):
    """Equation 20 of the paper falls with its u."""
    u = np.linspace(0.001, 0.999, 201)
    expected = 1 - u - scale * (np.cos(np.pi / 2 * u) ** 2 - 1 + u)
    result = np.asarray(Mode(scale=scale).quantile(jnp.asarray(1 - u, jnp.float32)))
    np.testing.assert_allclose(result, expected, atol=1e-5)
    assert (np.diff(result) < 0).all()
    if scale:  # more in the middle, or less
        assert (np.mean((result > 0.25) & (result < 0.75)) > 0.5) == (scale > 0)


@pytest.mark.parametrize("process", [Edm(), RectifiedFlow(shift=3.0), VariancePreservingProcess()])
def test_log_normal_noise_levels_are_the_same_for_every_process(process):
    u = jnp.linspace(0.01, 0.99, 99)
    times = LogNormalSigma(mean=-0.5, std=0.8)(process, u)
    ratio = np.log(process.sigma(times) / process.alpha(times))
    np.testing.assert_allclose(ratio, stats.norm.ppf(u, loc=-0.5, scale=0.8), atol=2e-3)


def test_noise_beyond_the_range_of_the_process_is_clipped():
    result = LogNormalSigma(mean=6.0)(Edm(), jnp.asarray([0.5, 1 - 2**-24]))
    np.testing.assert_array_equal(result, 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mode(scale=1.8), "between -1 and 1.75"),
        (lambda: Mode(scale=float("nan")), "between -1 and 1.75"),
        (lambda: LogNormalSigma(std=0.0), "must be positive"),
    ],
)
def test_invalid_distributions_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()
