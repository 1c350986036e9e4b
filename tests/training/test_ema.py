import jax.numpy as jnp
import numpy as np
import pytest

from dit_video.training.ema import update_ema


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
