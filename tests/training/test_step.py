import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dit_video.core import trees
from dit_video.training.digests import compute_digests
from dit_video.training.optim.ema import EmaConfig, gamma_from_sigma
from dit_video.training.optim.optimizer import AdamW, ScheduleFreeAdamW
from dit_video.training.optim.schedules import Constant, Cosine, WarmupStableDecay
from dit_video.training.state import init_state
from dit_video.training.step import BATCH_DIGESTS, Average, LossDetails, LossOutput
from support.compilations import count_compilations
from support.training_state import create_state, make_step

DRAW = np.random.default_rng(0)
X = jnp.asarray(DRAW.normal(size=(32, 4)), jnp.float32)
BATCH = {"x": X, "y": X @ jnp.asarray([[1.0], [-2.0], [0.5], [3.0]]) + 1}


def init(key):
    return {"w": 0.1 * jax.random.normal(key, (4, 1)), "b": jnp.zeros(1)}


def loss(params, batch, step):
    error = batch["x"] @ params["w"] + params["b"] - batch["y"]
    return jnp.square(error).mean(), {"largest": jnp.abs(error).max(), "at": step}


def start(optimizer):
    return create_state(init, optimizer, jax.random.key(0))


def test_the_loss_falls_to_zero():
    optimizer = AdamW(learning_rate=0.1, schedule=Cosine(warmup=5)).make(steps=200)
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


def test_metrics_are_float32_scalars_and_the_loss_receives_the_step():
    optimizer = optax.sgd(0.1)
    step, state = make_step(loss, optimizer, ema_decay=0.9), start(optimizer)
    for expected in range(3):
        state, figures = step(state, BATCH)
        digests = figures.pop(BATCH_DIGESTS)
        assert {path: int(digest) for path, digest in digests.items()} == compute_digests(trees.flatten(BATCH))
        assert set(figures) == {"loss", "gradient_norm", "largest", "at", "skipped"}
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
    optimizer = AdamW(schedule=WarmupStableDecay(warmup=2)).make(steps=10)
    step, state = make_step(loss, optimizer, ema_decay=0.9), start(optimizer)
    state, _ = step(state, BATCH)
    before = count_compilations()
    for _ in range(2):
        state, _ = step(state, BATCH)
    assert count_compilations() == before


def test_parameters_outside_the_loss_stay():
    optimizer = optax.sgd(0.1)
    state = start(optimizer).replace(extra={"codebook": jnp.arange(3.0)})
    state, _ = make_step(loss, optimizer, ema_decay=0.9)(state, BATCH)
    np.testing.assert_array_equal(state.extra["codebook"], [0, 1, 2])


# --- batches in parts -----------------------------------------------------------------------------------------------


class Counted:
    """The mean over the valid examples of a batch, of which its parts have unequal numbers."""

    def __call__(self, params, batch, step):
        error = jnp.square(batch["x"] @ params["w"] + params["b"] - batch["y"])[:, 0]
        counts = batch["counts"]
        mean = (error * counts).sum() / jnp.maximum(counts.sum(), 1)
        metrics = {"far": Average(((error > 4) * counts).sum(), counts.sum()), "none": Average(0 * mean, 0 * mean)}
        return LossOutput(mean, LossDetails(metrics, counts.sum()))


COUNTED = BATCH | {"counts": jnp.asarray((np.arange(32) * 7 % 11 < 5) * (1 + np.arange(32) // 8), jnp.float32)}


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_parts_of_a_batch_make_its_step(parts):
    optimizer = optax.sgd(0.1)
    whole, expected = make_step(Counted(), optimizer, ema_decay=0.9)(start(optimizer), COUNTED)
    state, figures = make_step(Counted(), optimizer, ema_decay=0.9, accumulation_steps=parts)(start(optimizer), COUNTED)
    for name in ("w", "b"):
        np.testing.assert_allclose(state.params[name], whole.params[name], rtol=1e-6, atol=1e-7)
    for name in ("loss", "gradient_norm"):
        assert figures[name] == pytest.approx(float(expected[name]), rel=1e-6)
    np.testing.assert_allclose(figures["far"], expected["far"])
    # The mean of the means of parts differs, because parts have unequal numbers of valid examples.
    counts = COUNTED["counts"].reshape(-1, parts).sum(axis=0)
    assert len(set(np.asarray(counts).tolist())) > 1
    params = start(optimizer).params
    means = [Counted()(params, jax.tree.map(lambda x, m=m: x[m::parts], COUNTED), 0)[0] for m in range(parts)]
    assert abs(float(np.mean(means)) / float(expected["loss"]) - 1) > 1e-3


def test_accumulation_refuses_a_loss_that_does_not_count_its_examples():
    optimizer = optax.sgd(0.1)
    with pytest.raises(TypeError, match=r"invalid for loss, which does not count .* Use accumulation_steps=1"):
        make_step(loss, optimizer, ema_decay=0.9, accumulation_steps=2)(start(optimizer), BATCH)


# --- averages -------------------------------------------------------------------------------------------------------


def test_further_averages_are_those_of_their_own_decay():
    optimizer = optax.sgd(0.1)
    step = make_step(loss, optimizer, ema_decay=0.9)
    averages = EmaConfig(decays=(0.5, 0.99), sigmas=(0.1,))
    state = init_state(init(jax.random.key(0)), optimizer, averages=averages)
    alone = {decay: start(optimizer) for decay in (0.5, 0.99)}
    seen = []
    for _ in range(20):
        state, _ = step(state, BATCH)
        seen.append(np.asarray(state.params["w"]))
    for decay, one in alone.items():
        own = make_step(loss, optimizer, ema_decay=decay)
        for _ in range(20):
            one, _ = own(one, BATCH)
        name = str(decay).replace(".", "_")
        np.testing.assert_allclose(state.averages["decay"][name]["w"], one.ema["w"], rtol=1e-6)
    power = gamma_from_sigma(0.1) + 1
    weights = np.diff(np.arange(21.0) ** power) / 20**power
    expected = np.tensordot(weights, np.stack(seen), 1)
    np.testing.assert_allclose(state.averages["power"]["0_1"]["w"], expected, rtol=1e-4)


def test_a_schedule_free_optimizer_is_evaluated_at_its_own_average():
    """The expected values follow arXiv 2405.15682, equations 3 to 5, with steps of Adam."""
    config = ScheduleFreeAdamW(learning_rate=0.05, schedule=Constant(warmup=4), b1=0.8, max_grad_norm=1e9)
    optimizer = config.make(steps=50)
    step, state = make_step(loss, optimizer, ema_decay=0.9), start(optimizer)
    adam = optax.scale_by_adam(b1=0.0, b2=config.b2)
    x = y = z = jax.tree.map(jnp.array, state.params)
    moments, total = adam.init(x), 0.0
    rates = config.make_schedule(steps=50)
    for number in range(12):
        state, _ = step(state, BATCH)
        gradients = jax.grad(lambda params: loss(params, BATCH, 0)[0])(y)
        moved, moments = adam.update(gradients, moments)
        rate = float(rates(number))
        z = jax.tree.map(lambda a, b, rate=rate: a - rate * b, z, moved)
        total += rate**2
        share = rate**2 / total
        x = jax.tree.map(lambda a, b, share=share: (1 - share) * a + share * b, x, z)
        y = jax.tree.map(lambda a, b: 0.8 * a + 0.2 * b, x, z)
    for name in ("w", "b"):
        np.testing.assert_allclose(state.params[name], y[name], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(state.ema[name], x[name], rtol=1e-4, atol=1e-5)
        assert (np.abs(state.ema[name] - state.params[name]) > 1e-3).any()
