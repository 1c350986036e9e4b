"""Autoencoders whose latents are codes are trained on rendered shapes, resumed, and sharded."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_video.core.errors import UserError
from dit_video.core.trees import flatten
from dit_video.models.autoencoders import AdversarialConfig, AutoencoderObjective, ImageLevels, ImageVaeConfig, VqConfig
from dit_video.nn import get_graph_def
from dit_video.training.checkpoint import Checkpoints
from dit_video.training.losses.adversarial import AdversarialStep, DiscriminatorTraining
from dit_video.training.losses.vq import CodebookLearning, VqLoss, VqStep
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
    step = VqStep(loss=make_loss(learning, make), optimizer=OPTIMIZER, ema_decay=0.9)
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
    loss = VqLoss(
        graph=get_graph_def(Patches),
        objective=AutoencoderObjective.pixels(),
        seed=3,
        learning=AVERAGES,
        optimizer=frozen,
    )
    optimizer = frozen.make(steps=80)
    step = VqStep(loss=loss, optimizer=optimizer, ema_decay=0.9)
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


CODES = jnp.asarray([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [9.0, 9.0]])
LATENTS = jnp.asarray([[0.5, 0.5], [0.5, -0.5], [2.0, 0.0], [0.0, 3.0]]).reshape(1, 1, 2, 2, 2)
INDICES = jnp.asarray([0, 0, 1, 2]).reshape(1, 1, 2, 2)
RANDOM = jax.random.key(0)


def follow(learning, codes=CODES, moments=None, latents=LATENTS, indices=INDICES, random=RANDOM):
    return _follow(learning, codes, moments or learning.init_moments(codes), latents, indices, random)


@functools.partial(jax.jit, static_argnums=0)
def _follow(learning, codes, moments, latents, indices, random):
    return learning.update(codes, moments, latents, indices, random)


def test_moving_averages_update_codes_as_written_out():
    learning = CodebookLearning(decay=0.9, smoothing=1e-3, restart_after=None)
    result = follow(learning)
    counts = 0.9 * np.ones(4) + 0.1 * np.asarray([2, 1, 1, 0])
    sums = 0.9 * np.asarray(CODES) + 0.1 * np.asarray([[1, 0], [2, 0], [0, 3], [0, 0]])
    total = counts.sum()
    smoothed = (counts + 1e-3) / (total + 4e-3) * total
    np.testing.assert_allclose(result.moments["counts"], counts, rtol=1e-6)
    np.testing.assert_allclose(result.moments["sums"], sums, rtol=1e-6)
    np.testing.assert_allclose(result.codes, sums / smoothed[:, None], rtol=1e-5)
    np.testing.assert_array_equal(result.moments["ages"], [0, 0, 0, 1])
    assert not result.restarted.any()


def test_codes_go_to_the_means_of_what_they_stand_for():
    learning = CodebookLearning(decay=0.9, restart_after=None)
    result = follow(learning)
    for _ in range(150):
        result = follow(learning, result.codes, result.moments)
    np.testing.assert_allclose(result.codes[:3], [[0.5, 0], [2, 0], [0, 3]], atol=1e-2)


def test_without_decay_codes_are_left_to_the_gradients():
    result = follow(CodebookLearning(decay=None, restart_after=None))
    np.testing.assert_array_equal(result.codes, CODES)
    assert set(result.moments) == {"ages"}


@pytest.mark.parametrize("decay", [None, 0.9])
def test_a_code_that_is_not_used_comes_back_among_the_latents(decay):
    learning = CodebookLearning(decay=decay, restart_after=3)
    moments = learning.init_moments(CODES) | {"ages": jnp.zeros(4, jnp.int32)}
    codes = CODES
    for step in range(1, 4):
        result = follow(learning, codes, moments)
        codes, moments = result.codes, result.moments
        assert result.metrics["restarts"] == (step == 3)
        np.testing.assert_array_equal(result.restarted, [False, False, False, step == 3])
    flat = np.asarray(LATENTS).reshape(-1, 2)
    assert (np.asarray(codes[3]) == flat).all(axis=-1).any()
    np.testing.assert_array_equal(moments["ages"], 0)
    if decay is not None:  # its average restarts there
        np.testing.assert_array_equal(moments["sums"][3], codes[3])
        assert moments["counts"][3] == 1


def test_a_new_codebook_starts_at_the_first_latents():
    learning = CodebookLearning()
    codes = jnp.full((4, 2), 50.0)
    latents = jax.random.normal(jax.random.key(1), (2, 1, 4, 4, 2))
    result = follow(learning, codes, latents=latents, indices=jnp.zeros((2, 1, 4, 4), jnp.int32))
    flat = np.asarray(latents).reshape(-1, 2)
    places = [np.flatnonzero((flat == np.asarray(code)).all(axis=-1)) for code in result.codes[1:]]
    assert [len(place) for place in places] == [1, 1, 1]
    assert len(np.unique(np.concatenate(places))) == 3  # one latent each
    again = follow(learning, codes, latents=latents, indices=jnp.zeros((2, 1, 4, 4), jnp.int32))
    np.testing.assert_array_equal(again.codes, result.codes)
    other = learning.update(
        codes, learning.init_moments(codes), latents, jnp.zeros((2, 1, 4, 4), jnp.int32), jax.random.key(5)
    )
    assert (other.codes != result.codes).any()


def test_a_learned_codebook_stays_where_it_is():
    learning = CodebookLearning(decay=None)
    result = follow(learning, moments=learning.init_moments(CODES, fresh=False))
    np.testing.assert_array_equal(result.codes, CODES)
    assert result.metrics["restarts"] == 0


def test_restarts_replace_at_most_as_many_codes_as_there_are_latents():
    learning = CodebookLearning(restart_after=1)
    codes = jnp.full((9, 2), 50.0)
    result = follow(learning, codes)
    assert np.isfinite(result.codes).all()
    assert result.metrics["restarts"] == 6


def test_the_figures_are_usage_and_perplexity_of_the_codes():
    figures = follow(CodebookLearning(restart_after=None)).metrics
    assert set(figures) == {"usage", "perplexity"}
    assert figures["usage"] == 0.75
    assert figures["perplexity"] == pytest.approx(np.exp(0.5 * np.log(2) + 0.5 * np.log(4)))
    even = jnp.arange(4).reshape(1, 1, 2, 2)
    figures = follow(CodebookLearning(), indices=even).metrics
    assert figures["perplexity"] == pytest.approx(4)
    assert (figures["usage"], figures["usage_recent"], figures["restarts"]) == (1, 1, 0)
    learning = CodebookLearning(restart_after=5)
    moments = learning.init_moments(CODES) | {"ages": jnp.asarray([9, 9, 9, 2])}
    assert follow(learning, moments=moments).metrics["usage_recent"] == 1  # the last was used three steps ago


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 1.0}, r"decay=1\.0 is invalid: it must lie in \[0, 1\)"),
        ({"commitment": -1.0}, r"commitment=-1\.0 is invalid"),
        ({"smoothing": 0.0}, "smoothing=0.0 is invalid: it must be positive"),
        ({"restart_after": 0}, "restart_after=0 is invalid: it must be at least 1"),
    ],
)
def test_invalid_codebook_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        CodebookLearning(**options)
