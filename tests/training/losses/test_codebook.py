"""Autoencoders whose latents are codes are trained on rendered shapes, resumed, and sharded."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_video.core.trees import flatten
from dit_video.models.autoencoders import (
    AdversarialConfig,
    AutoencoderObjective,
    CodebookLearning,
    CodebookLoss,
    ImageLevels,
    ImageVaeConfig,
    VqConfig,
)
from dit_video.nn import get_graph_def
from dit_video.training.checkpoint import Checkpoints
from dit_video.training.losses.adversarial import AdversarialStep, DiscriminatorTraining
from dit_video.training.losses.autoencoder import AutoencoderLoss, AutoencoderStep
from dit_video.training.optim.optimizer import AdamW
from dit_video.training.optim.schedules import Constant
from dit_video.training.step import get_scalars
from support.codebook_model import AVERAGES, CLIPS, CODEBOOK, OPTIMIZER, Patches, init, make_loss
from support.devices import check_on_eight_devices

NETWORK = ImageVaeConfig(channels=8, levels=ImageLevels(widths=(8, 16), blocks=1, groups=4, middle_attention=False))
GRADIENTS = CodebookLearning(decay=None, restart_after=10)


@functools.cache
def setting(learning, make=Patches):
    """Return the step, and its compiled function."""
    step = AutoencoderStep(loss=make_loss(learning, make), optimizer=OPTIMIZER, ema_decay=0.9)
    return step, step.compile()


def start(step, make=Patches):
    return jax.jit(lambda key: step.init(init(key, make=make)))(jax.random.key(0))


def train(learning, steps, *, make=Patches, state=None):
    train_step, step = setting(learning, make)
    if state is None:
        state = start(train_step, make)
    history = []
    while state.step < steps:
        state, figures = step(state, CLIPS)
        history.append({name: float(value) for name, value in get_scalars(figures).items()})
    return state, history


@pytest.fixture(scope="module")
def averaged():
    return train(AVERAGES, 40)


def check_comes_back(history):
    assert history[0]["usage"] == 1 / 16
    assert history[0]["perplexity"] == pytest.approx(1)
    assert history[0]["restarts"] == 15
    assert history[-1]["usage"] > 0.5
    assert history[-1]["usage_recent"] > 0.7
    assert history[-1]["perplexity"] > 2
    assert history[-1]["psnr"] > history[1]["psnr"] + 3
    assert history[-1]["loss"] < 0.5 * history[1]["loss"]


def test_a_codebook_far_away_comes_back_and_is_used(averaged):
    check_comes_back(averaged[1])
    check_comes_back(train(GRADIENTS, 40)[1])


@pytest.mark.slow
def test_a_small_movq_learns_rendered_shapes():
    _, history = train(AVERAGES, 40, make=VqConfig(network=NETWORK, codebook=CODEBOOK, modulated=True).make)
    check_comes_back(history)


def test_without_restarts_a_codebook_far_away_stays_unused():
    _, history = train(CodebookLearning(decay=0.95, restart_after=None), 40)
    assert history[-1]["usage"] <= 2 / 16
    assert "restarts" not in history[-1]


def test_the_averaged_parameters_have_the_codes_themselves(averaged):
    state, _ = averaged
    codes, same = state.params["codebook"]["codes"], state.ema["codebook"]["codes"]
    np.testing.assert_array_equal(codes, same)
    assert codes.unsafe_buffer_pointer() != same.unsafe_buffer_pointer()  # both are donated to the next step
    assert (state.params["to_codes"]["kernel"] != state.ema["to_codes"]["kernel"]).any()


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    whole, _ = train(AVERAGES, 14)
    half, _ = train(AVERAGES, 7)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(7, half, {})
    checkpoints.wait()
    restored, _ = checkpoints.restore(jax.eval_shape(lambda: start(setting(AVERAGES)[0])))
    assert int(restored.extra["codebook"]["ages"].max()) > 0
    resumed, _ = train(AVERAGES, 14, state=restored)
    for path, leaf in flatten(whole).items():
        np.testing.assert_array_equal(flatten(resumed)[path], leaf, err_msg=path)


def test_frozen_codes_stay_and_their_usage_is_reported():
    frozen = AdamW(learning_rate=3e-3, schedule=Constant(warmup=5), frozen=("codebook",))
    loss = AutoencoderLoss(
        graph=get_graph_def(Patches),
        objective=AutoencoderObjective.pixels(),
        latents=CodebookLoss(learning=AVERAGES, is_trained=False),
        seed=3,
        optimizer=frozen,
    )
    optimizer = frozen.make(steps=80)
    step = AutoencoderStep(loss=loss, optimizer=optimizer, ema_decay=0.9)
    state = start(step)
    codes = np.asarray(state.params["codebook"]["codes"])
    state, figures = step.compile()(state, CLIPS)
    np.testing.assert_array_equal(state.params["codebook"]["codes"], codes)
    np.testing.assert_allclose(state.ema["codebook"]["codes"], codes, rtol=1e-6)
    assert figures["usage"] == 1 / 16
    assert "restarts" not in figures


@pytest.mark.slow
def test_against_a_discriminator_the_codebook_is_learned_alike():
    train_step, step = setting(AVERAGES)
    rival = DiscriminatorTraining(
        config=AdversarialConfig(start_step=0, width=4, layers=1),
        last_layer="from_codes/kernel",
        random_key=jax.random.key(1),
    )
    state = rival.init_state(start(train_step))
    both, figures = AdversarialStep(autoencoder=train_step, discriminator=rival).compile()(state, CLIPS)
    assert figures["adversarial_weight"] != 0
    assert figures["restarts"] == 15
    alone, _ = step(start(train_step), CLIPS)
    np.testing.assert_allclose(both.model.params["codebook"]["codes"], alone.params["codebook"]["codes"], rtol=1e-5)
    assert both.model.extra["codebook"]["ages"].max() == 0


def test_the_figures_are_the_parts_of_the_loss():
    params = init(jax.random.key(0))
    for learning, weight in ((AVERAGES, 0.25), (GRADIENTS, 1.25)):
        value, (figures, *_) = make_loss(learning)(params, jnp.asarray(CLIPS), jnp.asarray(0))
        parts = figures["mse"] + 0.1 * figures["absolute"] + weight * figures["commitment"]
        assert float(value) == pytest.approx(float(parts), rel=1e-5)


@pytest.mark.slow
def test_eight_devices_have_the_codebook_of_one():
    check_on_eight_devices("codebook_training.py")
