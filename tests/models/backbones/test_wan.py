"""Factors of Wan's positions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dit_video.core.errors import UserError
from dit_video.models.backbones.wan import WanDitConfig
from dit_video.models.conditioning import Conditioning, TextTokens
from dit_video.nn import get_graph_def
from dit_video.tokens import Grid, PackedRows, Rotary3d, compute_positions
from support.random_params import make_random_params

CONFIG = WanDitConfig(
    channels=2, context_width=6, width=24, mlp_dim=32, layers=1, heads=2, time_width=8, text_length=4, attention="dense"
)
PARAMS = make_random_params(CONFIG.make)
GRID = Grid(3, 2, 2)
DRAW = np.random.default_rng(0)
NOISY = jnp.asarray(DRAW.normal(size=(1, GRID.volume, 8)), jnp.float32)
TEXT = TextTokens(jnp.asarray(DRAW.normal(size=(1, 2, 6)), jnp.float32), jnp.ones((1, 2), jnp.int32))


def predict(config, positions):
    layout = PackedRows(segments=np.ones((1, GRID.volume), np.int32), positions=positions[None], count=1)
    run = jax.jit(lambda params: nnx.merge(get_graph_def(config.make), params)(NOISY, TIME, layout, Conditioning(TEXT)))
    return run(PARAMS)[0]


TIME, POSITIONS = jnp.full((1, 1), 0.6), compute_positions(GRID)


@pytest.mark.nightly
def test_factors_of_1_change_nothing_and_a_scale_multiplies_positions():
    plain = predict(CONFIG, POSITIONS)
    ones = dataclasses.replace(CONFIG, position_scale=(1.0, 1.0, 1.0), position_stretch=(1.0, 1.0, 1.0))
    np.testing.assert_array_equal(predict(ones, POSITIONS), plain)
    scale = (2 / 3, 0.5, 1.0)
    scaled = predict(dataclasses.replace(CONFIG, position_scale=scale), POSITIONS)
    np.testing.assert_allclose(scaled, predict(CONFIG, POSITIONS * np.float32(scale)), atol=1e-6)
    stretched = predict(dataclasses.replace(CONFIG, position_stretch=(2.0, 1.0, 1.0)), POSITIONS)
    for other in (scaled, stretched):
        assert np.abs(other - plain).max() > 1e-4


def test_factors_are_those_of_the_rotary_embedding():
    config = dataclasses.replace(CONFIG, position_scale=(0.5, 1.0, 1.0), position_stretch=(1.0, 2.0, 2.0))
    assert config.rotary_embedding == Rotary3d(split=(4, 4, 4), scale=(0.5, 1.0, 1.0), stretch=(1.0, 2.0, 2.0))
    assert CONFIG.rotary_embedding == Rotary3d.even(12)
    with pytest.raises(UserError, match="must be positive"):
        dataclasses.replace(CONFIG, position_scale=(0.0, 1.0, 1.0))
