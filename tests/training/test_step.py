import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dit_video.training.optimizer import OptimizerConfig, make_optimizer
from dit_video.training.state import new_state
from dit_video.training.step import make_step

DRAW = np.random.default_rng(0)
X = jnp.asarray(DRAW.normal(size=(32, 4)), jnp.float32)
BATCH = {"x": X, "y": X @ jnp.asarray([[1.0], [-2.0], [0.5], [3.0]]) + 1}


def init(key):
    return {"w": 0.1 * jax.random.normal(key, (4, 1)), "b": jnp.zeros(1)}


def loss(params, batch, step):
    error = batch["x"] @ params["w"] + params["b"] - batch["y"]
    return jnp.square(error).mean(), {"largest": jnp.abs(error).max(), "at": step}


def start(optimizer):
    return new_state(init, optimizer, jax.random.key(0))


def test_the_loss_falls_to_zero():
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.1, warmup=5, schedule="cosine"), steps=200)
    step, state = make_step(loss, optimizer, ema_decay=0.9), start(optimizer)
    losses = []
    for _ in range(200):
        state, figures = step(state, BATCH)
        losses.append(float(figures["loss"]))
    assert losses[0] > 5
    assert losses[-1] < 1e-3
    assert state.step == 200
    np.testing.assert_allclose(state.ema["w"], state.params["w"], atol=1e-2)


def test_a_step_is_the_gradient_step_written_out():
    optimizer = optax.sgd(0.1)
    step, state = make_step(loss, optimizer, ema_decay=0.999), start(optimizer)
    params = jax.device_get(state.params)
    (value, _), gradients = jax.value_and_grad(loss, has_aux=True)(params, BATCH, 0)
    state, figures = step(state, BATCH)
    for name in params:
        expected = params[name] - 0.1 * gradients[name]
        np.testing.assert_allclose(state.params[name], expected, rtol=1e-5)
        # The average follows the new parameters: at the first step nine tenths of the way.
        np.testing.assert_allclose(state.ema[name], 0.1 * params[name] + 0.9 * expected, rtol=1e-5)
    assert figures["loss"] == pytest.approx(float(value))
    assert figures["gradient_norm"] == pytest.approx(float(optax.tree.norm(gradients)), rel=1e-5)


def test_figures_are_float32_scalars_and_the_loss_is_told_the_step():
    optimizer = optax.sgd(0.1)
    step, state = make_step(loss, optimizer, ema_decay=0.9), start(optimizer)
    for expected in range(3):
        state, figures = step(state, BATCH)
        assert set(figures) == {"loss", "gradient_norm", "largest", "at"}
        assert {(figure.shape, figure.dtype.name) for figure in figures.values()} == {((), "float32")}
        assert figures["at"] == expected


def test_the_state_is_donated_and_the_batch_is_not():
    optimizer = optax.adam(0.1)
    step, state = make_step(loss, optimizer, ema_decay=0.9), start(optimizer)
    following, _ = step(state, BATCH)
    for name in ("params", "ema", "opt_state"):
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(getattr(state, name))), name
    assert not BATCH["x"].is_deleted()
    assert jax.tree.structure(following) == jax.tree.structure(state)
    assert step(following, BATCH)[0].step == 2


def test_one_program_for_all_steps():
    optimizer = make_optimizer(OptimizerConfig(schedule="wsd", warmup=2), steps=10)
    step, state = make_step(loss, optimizer, ema_decay=0.9), start(optimizer)
    for _ in range(3):
        state, _ = step(state, BATCH)
    assert step._cache_size() == 1


def test_what_a_loss_does_not_train_stays():
    optimizer = optax.sgd(0.1)
    state = start(optimizer).replace(extra={"codebook": jnp.arange(3.0)})
    state, _ = make_step(loss, optimizer, ema_decay=0.9)(state, BATCH)
    np.testing.assert_array_equal(state.extra["codebook"], [0, 1, 2])
