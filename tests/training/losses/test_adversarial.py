"""Training of a tiny autoencoder against a tinier discriminator."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dit_video.core import trees
from dit_video.core.errors import UserError
from dit_video.distributed import Parallelism, make_mesh
from dit_video.models.autoencoders import R1, AdversarialConfig
from dit_video.models.autoencoders.adversarial import compute_adaptive_weight, generator_loss
from dit_video.nn import get_graph_def
from dit_video.training.hooks import logging
from dit_video.training.loop import LoopConfig
from dit_video.training.losses.adversarial import AdversarialStep, HostStepCounter
from dit_video.training.state import init_state
from dit_video.training.step import get_scalars
from dit_video.training.trainer import Trainer
from support.adversarial_game import (
    CLIPS,
    CONFIG,
    LECAM,
    LOSS,
    PARAMS,
    SGD,
    init_game,
    make_game_step,
    make_train_step,
)
from support.devices import check_on_eight_devices
from support.training_state import make_step


def run(config, steps):
    """Return the states and figures from the start on, on the host."""
    state = init_game(config)
    states, figures = [jax.device_get(state)], []
    for _ in range(steps):
        state, result = make_game_step(config)(state, CLIPS)
        states.append(jax.device_get(state))
        figures.append({name: float(value) for name, value in get_scalars(result).items()})
    return states, figures


@pytest.fixture(scope="module")
def played():
    """Return the states and figures of four steps with LeCam, two of them before the start."""
    return run(LECAM, 4)


def moved(before, after):
    return any(not np.array_equal(a, b) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))


@pytest.mark.slow
def test_before_its_start_step_the_discriminator_rests_and_changes_nothing(played):
    states, figures = played
    assert not moved(states[0].discriminator, states[2].discriminator)
    assert moved(states[2].discriminator.params, states[3].discriminator.params)
    alone, step = init_state(jax.tree.map(jnp.array, PARAMS), SGD), make_step(LOSS, SGD, ema_decay=0.9)
    for number in range(2):
        alone, expected = step(alone, CLIPS)
        expected = get_scalars(expected)
        assert {name: figures[number][name] for name in expected} == {n: float(v) for n, v in expected.items()}
        assert figures[number]["against"] == figures[number]["adversarial_weight"] == 0
    jax.tree.map(np.testing.assert_array_equal, states[2].model, jax.device_get(alone))


@pytest.mark.slow
def test_the_step_descends_the_weighted_sum(played):
    """The expected gradient is that of the whole sum, with a weight computed from two whole gradients."""
    states, figures = played
    before, after = states[2], states[3]
    judge = nnx.merge(get_graph_def(LECAM.make), before.discriminator.params)
    pixels = LOSS.to_pixels(jnp.asarray(CLIPS))

    @jax.jit
    def parts(params):
        decoded = LOSS.decode(params, pixels, jnp.asarray(before.step))
        compared = LOSS.compare(decoded.pixels, pixels)[0].mean()
        return jnp.stack([compared, generator_loss(judge(decoded.pixels)).mean(), decoded.bottleneck.mean()])

    jacobian = jax.jit(jax.jacrev(parts))(before.model.params)
    last = trees.flatten(jacobian)[CONFIG.last_layer]
    weight = 0.5 * compute_adaptive_weight(last[0], last[1])
    assert figures[2]["adversarial_weight"] == pytest.approx(float(weight), rel=1e-4)
    expected = jax.tree.map(
        lambda value, rows: value - 1e-2 * (rows[0] + weight * rows[1] + rows[2]), before.model.params, jacobian
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), after.model.params, expected)
    compared, against, bottleneck = parts(before.model.params)
    assert figures[2]["against"] == pytest.approx(float(against), rel=1e-5, abs=1e-6)
    assert figures[2]["loss"] == pytest.approx(float(compared + weight * against + bottleneck), rel=1e-5)


@pytest.mark.slow
def test_lecam_keeps_running_means_of_the_verdicts(played):
    states, figures = played
    for name in ("real", "decoded"):
        first = 0.01 * figures[2][f"verdict_{name}"]
        second = 0.99 * first + 0.01 * figures[3][f"verdict_{name}"]
        np.testing.assert_allclose(states[4].discriminator.means[name], second, rtol=1e-4)
    assert figures[2]["penalty"] > 0


@pytest.mark.slow
def test_the_discriminator_learns_to_tell_them_apart_with_r1_on_every_kth_step():
    regulariser = R1(weight=0.1, every=3)
    config = AdversarialConfig(weight=1e-3, width=8, layers=1, learning_rate=1e-2, regulariser=regulariser)
    states, figures = run(config, 25)
    gaps = [result["verdict_real"] - result["verdict_decoded"] for result in figures]
    assert abs(gaps[0]) < 0.5
    assert gaps[-1] > 1
    assert figures[-1]["discriminator"] < 0.7 * figures[0]["discriminator"]
    assert [result["penalty"] > 0 for result in figures] == [step % 3 == 0 for step in range(25)]
    assert states[0].discriminator.means == {}


def test_the_device_is_asked_for_its_step_only_where_states_do_not_follow_each_other():
    class Step:
        def __init__(self, number):
            self.number, self.reads = number, 0

        def __int__(self):
            self.reads += 1
            return self.number

    count, steps = HostStepCounter(), [Step(number) for number in (7, 8, 9)]
    for step, after in itertools.pairwise(steps):
        assert count(step) == step.number
        count.advance(after)
    assert [step.reads for step in steps] == [1, 0, 0]
    restored = Step(3)
    assert count(restored) == 3


class Repeated:
    """The same clips again and again."""

    hash = "clips"

    def __iter__(self):
        return self

    def __next__(self):
        return CLIPS

    def close(self):
        pass


def train(folder, steps, batches=Repeated):
    training = Trainer(
        folder=folder,
        name="training",
        init=lambda key: PARAMS,
        random_key=jax.random.key(0),
        train_step=make_train_step(LECAM),
        config=LoopConfig(steps=steps, log_every=1, save_every=2),
        mesh=make_mesh(Parallelism(), jax.devices()[:1]),
    )
    return training.run(lambda start: batches())


@pytest.mark.slow
def test_an_interrupted_game_ends_bit_for_bit_as_the_uninterrupted_one(tmp_path, monkeypatch):
    make_game_step(LECAM)
    monkeypatch.setattr(AdversarialStep, "compile", lambda *_, **__: make_game_step(LECAM))  # compiled already
    whole = train(tmp_path / "whole", 6)
    for steps in (3, 5, 6):  # before its start step and after it
        parts = train(tmp_path / "parts", steps)
        assert int(parts.step) == steps
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(parts), jax.device_get(whole))
    figures = [
        [{name: entry[name] for name in ("loss", "discriminator", "penalty", "psnr")} for entry in entries]
        for entries in (logging.read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts"))
    ]
    assert figures[0] == figures[1]
    assert len(figures[0]) == 6


@pytest.mark.slow
def test_other_data_than_those_of_the_checkpoint_are_refused(tmp_path, monkeypatch):
    make_game_step(LECAM)
    monkeypatch.setattr(AdversarialStep, "compile", lambda *_, **__: make_game_step(LECAM))

    class Others(Repeated):
        hash = "others"

    train(tmp_path / "run" / "autoencoder", 2)
    with pytest.raises(UserError, match="differ from those of its checkpoint at step 2"):
        train(tmp_path / "run" / "autoencoder", 4, Others)


@pytest.mark.slow
def test_on_eight_devices_both_players_are_divided_and_play_as_on_one():
    check_on_eight_devices("adversarial_training.py")
