"""Adapters are trained by a step whose last constant is the model."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from dit_video.core import rng
from dit_video.core.trees import flatten
from dit_video.nn import Linear, LoraConfig, add_lora_scale, get_graph_def, init_lora, init_params, merge_lora
from dit_video.training.losses.lora import LoraLoss
from dit_video.training.state import init_state
from support.training_state import make_step

CONFIG = LoraConfig(rank=2, alpha=4.0, targets=("kernel$",))
GRAPH = get_graph_def(lambda rngs: Linear(6, 5, rngs=rngs))
BASE = init_params(lambda rngs: Linear(6, 5, rngs=rngs), rng.key(0, "base"))
NOISE = np.random.default_rng(0)
X = jnp.asarray(NOISE.normal(size=(64, 6)), jnp.float32)
CHANGE = NOISE.normal(size=(6, 1)) @ NOISE.normal(size=(1, 5))
TARGET = nnx.merge(GRAPH, BASE)(X) + X @ jnp.asarray(CHANGE, jnp.float32)
"""Targets that a change of rank 1 explains."""


def loss(params, x, step, weight):
    error = nnx.merge(GRAPH, params)(x) - TARGET
    return weight * jnp.square(error).mean(axis=(0, 1)), {}


ADAPTED = LoraLoss(loss=loss, scale=CONFIG.scale)
OPTIMIZER = optax.adam(3e-2)


def fresh():
    return init_lora(BASE, CONFIG, rng.key(0, "lora"))


def train(steps):
    weight = jnp.ones(())
    step = make_step(ADAPTED, OPTIMIZER, ema_decay=0.0, constants=(weight, BASE))
    state, losses = init_state(fresh(), OPTIMIZER), []
    for _ in range(steps):
        state, figures = step(state, X)
        losses.append(float(figures["loss"]))
    return state, losses


def test_adapter_training_starts_at_the_models_loss_and_finds_a_low_rank_change():
    state, losses = train(300)
    assert losses[0] == pytest.approx(float(loss(BASE, X, 0, 1.0)[0]), rel=1e-6)
    assert losses[-1] < 1e-3 * losses[0]
    assert set(flatten(state.params)) == {"kernel/a", "kernel/b"}
    merged = merge_lora(BASE, add_lora_scale(state.ema, CONFIG.scale))
    np.testing.assert_allclose(merged["kernel"] - BASE["kernel"], CHANGE, atol=0.1)
    np.testing.assert_array_equal(merged["bias"], BASE["bias"])


def test_adapter_gradients_are_those_of_the_merged_model():
    factors = jax.tree.map(lambda leaf: leaf + 0.1, fresh())
    result = jax.grad(lambda f: ADAPTED(f, X, jnp.zeros((), jnp.int32), 1.0, BASE)[0])(factors)
    expected = jax.grad(lambda f: loss(merge_lora(BASE, add_lora_scale(f, CONFIG.scale)), X, 0, 1.0)[0])(factors)
    for path, leaf in flatten(expected).items():
        assert np.abs(leaf).max() > 1e-3
        np.testing.assert_allclose(flatten(result)[path], leaf, rtol=1e-4, atol=1e-6)
