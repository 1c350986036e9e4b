"""A tiny autoencoder and a tinier discriminator, on two windows of four frames."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dit_video.models.autoencoders import AdversarialConfig, AutoencoderObjective, LeCam, PatchVaeConfig
from dit_video.nn import get_graph_def
from dit_video.tokens import Grid
from dit_video.training.losses.adversarial import AdversarialStep, DiscriminatorTraining
from dit_video.training.losses.autoencoder import AutoencoderLoss, AutoencoderStep
from dit_video.training.state import init_state
from support.random_params import make_random_params

CONFIG = PatchVaeConfig(stride=Grid(2, 2, 2), channels=3, width=8, blocks=1)
CLIPS = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 8, 3), np.uint8)
PARAMS = make_random_params(CONFIG.make)
OBJECTIVE = AutoencoderObjective.pixels()
LOSS = AutoencoderLoss(
    graph=get_graph_def(CONFIG.make), objective=OBJECTIVE, latents=CONFIG.make_loss(OBJECTIVE), seed=1
)
SGD = optax.sgd(1e-2)
LECAM = AdversarialConfig(
    weight=0.5, start_step=2, width=4, layers=1, learning_rate=1e-2, regulariser=LeCam(weight=0.1)
)


def make_discriminator(config: AdversarialConfig) -> DiscriminatorTraining:
    """Return the training of a discriminator."""
    return DiscriminatorTraining(config=config, last_layer=CONFIG.last_layer, random_key=jax.random.key(3))


def init_game(config: AdversarialConfig):
    """Return the state of both players before the first step."""
    return make_discriminator(config).init_state(init_state(jax.tree.map(jnp.array, PARAMS), SGD))


@functools.cache
def make_game_step(config: AdversarialConfig):
    """Return the step of both players, compiled once."""
    return make_train_step(config).compile()


def make_train_step(config: AdversarialConfig) -> AdversarialStep:
    """Return the step of both players."""
    autoencoder = AutoencoderStep(loss=LOSS, optimizer=SGD, ema_decay=0.9)
    return AdversarialStep(autoencoder=autoencoder, discriminator=make_discriminator(config))
