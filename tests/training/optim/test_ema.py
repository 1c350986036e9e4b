import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dit_video.core.errors import MissingError, UserError
from dit_video.training.optim.ema import (
    EmaConfig,
    EmaSnapshots,
    WeightProfile,
    gamma_from_sigma,
    inner_product,
    solve_coefficients,
    update_averages,
    update_ema,
)
from dit_video.training.state import init_state
from dit_video.weights import load


def decay_at(step: int, decay: float) -> float:
    return float(update_ema({"w": jnp.ones(())}, {"w": jnp.zeros(())}, jnp.asarray(step), decay=decay)["w"])


def test_early_steps_count_less():
    assert decay_at(0, 0.999) == pytest.approx(1 / 10)
    assert decay_at(10, 0.999) == pytest.approx(11 / 20)
    assert decay_at(10**6, 0.999) == pytest.approx(0.999)
    assert decay_at(10, 0.2) == pytest.approx(0.2)


def test_the_average_forgets_where_it_started():
    ema, params = {"w": jnp.full(3, 100.0)}, {"w": jnp.full(3, 1.0)}
    for step in range(60):
        ema = update_ema(ema, params, jnp.asarray(step), decay=0.9999)
    # At a decay of .9999 without warmup it would be 99.4.
    np.testing.assert_allclose(ema["w"], 1.0, atol=1e-3)


def test_small_changes_add_up_in_float32():
    ema = {"w": jnp.ones(())}
    for step in range(1000, 1100):
        ema = update_ema(ema, {"w": jnp.ones((), jnp.bfloat16) + jnp.bfloat16(2**-7)}, jnp.asarray(step), decay=0.99)
    assert ema["w"].dtype == jnp.float32
    assert ema["w"] == pytest.approx(1 + 2**-7 * (1 - 0.99**100), rel=1e-5)


# --- averages that are chosen afterwards ----------------------------------------------------------------------------


def test_widths_and_exponents_are_converted_as_in_the_paper():
    # Both values are in the paper (arXiv 2312.02696, section 3.2).
    assert gamma_from_sigma(0.05) == pytest.approx(16.97, abs=5e-3)
    assert gamma_from_sigma(0.10) == pytest.approx(6.94, abs=5e-3)
    for gamma in (0.0, 0.5, 3.0, 40.0):
        # The standard deviation of the weights themselves.
        s = (np.arange(100_000) + 0.5) / 100_000
        weights = s**gamma / (s**gamma).sum()
        mean = (weights * s).sum()
        assert gamma_from_sigma(np.sqrt((weights * (s - mean) ** 2).sum())) == pytest.approx(gamma, rel=1e-3, abs=1e-3)
    for wrong in (0.0, -0.1, 0.3):
        with pytest.raises(UserError, match="sigma_rel"):
            gamma_from_sigma(wrong)
    for options in ({"decays": (1.0,)}, {"sigmas": (0.4,)}, {"decays": (0.9, 0.9)}, {"snapshot_every": 0}):
        with pytest.raises(UserError):
            EmaConfig(**options)


def test_products_of_profiles_are_their_integrals():
    for left, right in [
        (WeightProfile(40, 6.94), WeightProfile(100, 16.97)),
        (WeightProfile(100, 2.0), WeightProfile(100, 7.0)),
    ]:
        s = (np.arange(400_000) + 0.5) * (100 / 400_000)
        values = [(g + 1) * np.where(s <= t, s, 0) ** g / t ** (g + 1) for t, g in (left, right)]
        assert inner_product(left, right) == pytest.approx((values[0] * values[1]).sum() * 100 / 400_000, rel=1e-4)
        assert inner_product(left, right) == pytest.approx(inner_product(right, left), rel=1e-12)


def test_a_kept_profile_is_its_own_combination():
    profiles = [WeightProfile(t, gamma_from_sigma(s)) for t in (100, 200, 300) for s in (0.05, 0.1)]
    np.testing.assert_allclose(solve_coefficients(profiles, profiles[3]), [0, 0, 0, 1, 0, 0], atol=1e-6)


STEPS, EVERY = 400, 25


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    """Return the snapshots of wandering parameters, and directly tracked averages of other widths."""
    draw = np.random.default_rng(0)
    path = np.cumsum(draw.normal(size=(STEPS, 5)), axis=0).astype(np.float32)
    folder = tmp_path_factory.mktemp("snapshots")
    widths = (0.05, 0.1, 0.07, 0.15, 0.03)
    start = {"backbone": {"w": jnp.zeros(5)}}
    kept, tracked = (init_state(start, optax.sgd(1.0), averages=EmaConfig(sigmas=s)) for s in (widths[:2], widths[2:]))
    update = jax.jit(update_averages)
    halfway = None
    for step, value in enumerate(path):
        params = {"backbone": {"w": jnp.asarray(value)}}
        kept = kept.replace(averages=update(kept.averages, params, jnp.asarray(step)))
        tracked = tracked.replace(averages=update(tracked.averages, params, jnp.asarray(step)))
        if (step + 1) % EVERY == 0:
            EmaSnapshots(folder).write(step + 1, kept)
        if step + 1 == STEPS // 2:
            halfway = jax.device_get(tracked.averages)
    return EmaSnapshots(folder), path, halfway, tracked.averages


def test_an_average_of_another_width_is_put_together(training):
    snapshots, path, halfway, tracked = training
    spread = np.abs(path[-100:] - path[-1]).mean()
    for sigma, name in ((0.07, "0_07"), (0.15, "0_15")):
        expected = np.asarray(tracked["power"][name]["backbone"]["w"])
        result = snapshots.reconstruct(sigma)["backbone"]["w"]
        assert np.abs(result - expected).max() < 0.005 * spread, sigma
        # A neighbouring width is farther away than the error of least squares.
        assert np.abs(np.asarray(tracked["power"]["0_03"]["backbone"]["w"]) - expected).max() > 0.2 * spread
    before = snapshots.reconstruct(0.07, step=STEPS // 2)["backbone"]["w"]
    assert np.abs(before - halfway["power"]["0_07"]["backbone"]["w"]).max() < 0.01 * spread
    only = snapshots.reconstruct(0.07, max_step=STEPS // 2)["backbone"]["w"]
    assert np.abs(only - halfway["power"]["0_07"]["backbone"]["w"]).max() < 0.01 * spread


def test_a_tracked_width_is_reconstructed_as_it_is(training):
    snapshots, _, _, _ = training
    result = snapshots.reconstruct(0.1)["backbone"]["w"]
    np.testing.assert_allclose(
        result, load(snapshots.folder / f"{STEPS:08}-0_1.safetensors")["backbone"]["w"], rtol=1e-4
    )


def test_missing_snapshots_are_reported(tmp_path):
    with pytest.raises(MissingError, match="has no snapshots"):
        EmaSnapshots(tmp_path).reconstruct(0.1)
