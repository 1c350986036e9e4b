import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dit_video.core.rng import key
from dit_video.core.trees import flatten
from dit_video.models.autoencoders import AutoencoderObjective, PatchVaeConfig
from dit_video.models.features import Lpips
from dit_video.nn import get_graph_def, init_params
from dit_video.tokens import Grid
from dit_video.training.losses.autoencoder import AutoencoderLoss
from dit_video.training.optim.optimizer import AdamW
from dit_video.training.optim.schedules import Constant
from dit_video.training.step import compute_gradients
from support.random_params import make_random_params
from support.training_state import create_state, make_step

CONFIG = PatchVaeConfig(stride=Grid(2, 2, 2), channels=3, width=8, blocks=1)
GRAPH = get_graph_def(CONFIG.make)
CLIPS = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 6, 3), np.uint8)


PARAMS = make_random_params(CONFIG.make)


@jax.jit
def _run(params, clips, step, kl):
    objective = AutoencoderObjective.pixels()
    object.__setattr__(objective, "kl", kl)  # traced, so that one program serves every weight
    output = make_loss(objective)(params, clips, step)
    return output.value, output.details.metrics


def make_loss(objective, **options):
    latents = CONFIG.make_loss(objective)
    return AutoencoderLoss(graph=GRAPH, objective=objective, latents=latents, seed=1, **options)


def run(clips=CLIPS, step=0, kl=0.0):
    return _run(PARAMS, clips, jnp.asarray(step), kl)


@jax.jit
def parts(params, clips):
    model = nnx.merge(GRAPH, params)
    posterior = model.posterior(clips.astype(jnp.float32) / 127.5 - 1)
    return posterior, posterior.kl()


def test_the_figures_are_the_parts_of_the_loss():
    value, figures = run()
    assert figures["psnr"] == pytest.approx(-10 * np.log10(figures["mse"] / 4), rel=1e-5)
    assert figures["kl"] == pytest.approx(float(parts(PARAMS, CLIPS)[1].mean()), rel=1e-5)
    # The rest is a tenth of the mean absolute error, which is below the root mean square.
    absolute = 10 * (float(value) - float(figures["mse"]))
    assert 0.5 * np.sqrt(figures["mse"]) < absolute < np.sqrt(figures["mse"])


def test_the_divergence_counts_with_its_weight():
    (value, figures), (without, _) = run(kl=0.25), run(kl=0.0)
    assert value == pytest.approx(float(without + 0.25 * figures["kl"]), rel=1e-5)


def test_noise_differs_between_steps_clips_and_seeds():
    same = np.stack([CLIPS[0], CLIPS[0]])
    losses = [float(run(same, step)[1]["mse"]) for step in range(3)]
    assert len(set(losses)) == 3
    assert run(same, 0)[1]["mse"] == run(same, 0)[1]["mse"]
    # Two equal clips have different noise: their mean is not that of one alone.
    assert run(same, 0)[1]["mse"] != pytest.approx(float(run(same[:1], 0)[1]["mse"]), rel=1e-6)


def test_a_batch_of_one_is_a_batch():
    value, figures = run(CLIPS[:1])
    assert np.isfinite(value)
    assert all(np.isfinite(figure) for figure in figures.values())


@pytest.mark.nightly
def test_a_few_steps_on_one_batch_reconstruct_it_better():
    optimizer = AdamW(learning_rate=3e-3, schedule=Constant(warmup=0)).make(steps=60)
    step = make_step(make_loss(AutoencoderObjective.pixels(kl=1e-4)), optimizer, ema_decay=0.9)
    state = create_state(lambda key: PARAMS, optimizer, jax.random.key(0))
    smooth = np.broadcast_to(np.arange(0, 240, 40, dtype=np.uint8)[None, None, None, :, None], CLIPS.shape).copy()
    first = None
    for _ in range(60):
        state, figures = step(state, smooth)
        first = first or float(figures["psnr"])
    assert figures["psnr"] > first + 8


@pytest.mark.nightly
def test_the_objective_of_pixels_is_bit_for_bit_the_sum_that_measured_runs_were_trained_with():
    def before(params, clips, step):
        pixels = clips.astype(jnp.float32) / 127.5 - 1
        model = nnx.merge(GRAPH, params)
        posterior = model.posterior(pixels)
        random = jax.random.fold_in(key(1, "latents"), step)
        error = model.reconstruct(posterior.sample(jax.random.normal(random, posterior.mean.shape))) - pixels
        squared, absolute = jnp.square(error).mean(axis=(1, 2, 3, 4)), jnp.abs(error).mean(axis=(1, 2, 3, 4))
        kl = posterior.kl()
        return (squared + 0.1 * absolute + 1e-4 * kl).mean(), {"mse": squared.mean(), "kl": kl.mean()}

    now = make_loss(AutoencoderObjective.pixels(kl=1e-4))
    optimizer = AdamW(learning_rate=3e-3, schedule=Constant(warmup=0)).make(steps=60)
    states, figures = {}, {}
    for name, loss in (("before", before), ("now", now)):
        step = make_step(loss, optimizer, ema_decay=0.9)
        states[name] = create_state(lambda key: jax.tree.map(jnp.copy, PARAMS), optimizer, jax.random.key(0))
        for _ in range(3):
            states[name], figures[name] = step(states[name], CLIPS)
    for name in ("loss", "mse", "kl", "gradient_norm"):
        assert figures["now"][name] == figures["before"][name]
    jax.tree.map(np.testing.assert_array_equal, states["now"], states["before"])


def test_parameters_that_are_not_trained_have_no_gradient():
    config = AdamW(trainable=("^decoder",))
    loss = make_loss(AutoencoderObjective.pixels(), optimizer=config)
    gradients = flatten(jax.jit(functools.partial(compute_gradients, loss))(PARAMS, CLIPS, jnp.asarray(0))[1])
    for path, gradient in gradients.items():
        assert bool(gradient.any()) == path.startswith("decoder"), path


def test_the_parts_of_the_default_objective_are_logged_and_add_up():
    objective = AutoencoderObjective(kl=1e-3)
    value, (figures, *_) = jax.jit(make_loss(objective))(PARAMS, CLIPS, jnp.asarray(0))
    parts = ("absolute", "pyramid", "frequency", "temporal", "kl")
    assert figures.keys() == {*parts, "mse", "psnr"}
    total = sum(getattr(objective, name) * float(figures[name]) for name in parts)
    assert value == pytest.approx(total, rel=1e-5)
    assert all(figures[name] > 0 for name in parts)


@pytest.mark.slow
def test_lpips_counts_with_weights_that_are_arguments_of_the_program():
    judge = functools.partial(Lpips, widths=(2, 2, 2, 2, 2))
    weights = init_params(lambda rngs: judge(rngs=rngs), jax.random.key(1))
    objective = dataclasses.replace(AutoencoderObjective.pixels(), lpips=0.5, lpips_weights="lpips.safetensors")
    loss = make_loss(objective, perceptual_net=get_graph_def(lambda rngs: judge(rngs=rngs)))
    clips = jnp.asarray(np.random.default_rng(1).integers(0, 256, (2, 1, 16, 16, 3), np.uint8))
    value, (figures, *_) = jax.jit(loss)(PARAMS, clips, jnp.asarray(0), weights)
    plain = figures["mse"] + 0.1 * figures["absolute"] + objective.kl * figures["kl"]
    assert figures["lpips"] > 0
    assert value == pytest.approx(float(plain + 0.5 * figures["lpips"]), rel=1e-5)
    _, (without, *_) = jax.jit(loss)(PARAMS, clips, jnp.asarray(0), jax.tree.map(jnp.zeros_like, weights))
    assert without["lpips"] == 0

    optimizer = AdamW(learning_rate=3e-3, schedule=Constant(warmup=0)).make(steps=60)
    step = make_step(loss, optimizer, ema_decay=0.9, constants=(weights,))
    state = create_state(lambda key: jax.tree.map(jnp.copy, PARAMS), optimizer, jax.random.key(0))
    assert step(state, clips)[1]["loss"] == pytest.approx(float(value), rel=1e-5)
