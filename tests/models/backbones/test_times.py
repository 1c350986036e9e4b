"""Times of clips with clean tokens: the same predictions as with a time for every token, in a smaller program."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dit_video.models.backbones.denoise import make_denoise_fn
from dit_video.models.backbones.dit import DiTConfig
from dit_video.models.backbones.mmdit import MMDiTConfig
from dit_video.models.backbones.protocol import ClipTimes
from dit_video.models.backbones.wan import WanDitConfig
from dit_video.models.conditioning import Conditioning, TextTokens
from dit_video.nn import get_graph_def
from dit_video.tokens import Grid, PackedRows, compute_positions
from support.marks import mark_slow_except
from support.random_params import make_random_params

SIZES = {"channels": 2, "context_width": 6, "width": 24, "layers": 2, "heads": 2, "time": "token", "attention": "dense"}
MODELS = {
    "wan": WanDitConfig(mlp_dim=32, text_length=4, time_width=8, **SIZES),
    "shared": DiTConfig(mlp_ratio=2.0, registers=2, **SIZES),
    "own": MMDiTConfig(mlp_ratio=2.0, **SIZES),
}
GRIDS = (Grid(2, 2, 2), Grid(3, 1, 2))
PADDING, TEXT = 2, 3
SEGMENTS = np.repeat([1, 2, 0], [GRIDS[0].volume, GRIDS[1].volume, PADDING])[None].astype(np.int32)
LAYOUT = PackedRows(
    segments=SEGMENTS,
    positions=np.concatenate([*map(compute_positions, GRIDS), np.zeros((PADDING, 3), np.float32)])[None],
    count=3,
)
TOKENS = SEGMENTS.shape[1]
DRAW = np.random.default_rng(0)
NOISY = jnp.asarray(DRAW.normal(size=(1, TOKENS, 8)), jnp.float32)
TEXTS = TextTokens(
    jnp.asarray(DRAW.normal(size=(1, 2 * TEXT, 6)), jnp.float32),
    jnp.asarray(np.repeat([[1, 2]], TEXT, axis=1), jnp.int32),
)
IS_CLEAN = jnp.asarray((SEGMENTS == 1) & (np.asarray(LAYOUT.positions)[..., 0] == 0))
"""Tokens of the first clip's first frame."""
TIME = jnp.where(IS_CLEAN, 0.0, LAYOUT.expand(jnp.asarray([[0.7, 0.3, 0.0]])))


def predict(config, params, *, is_clean):
    denoise = make_denoise_fn(
        nnx.merge(get_graph_def(config.make), params), LAYOUT, Conditioning(TEXTS), is_clean=is_clean
    )
    return denoise(NOISY, TIME, None)[0]


def test_clip_times_are_those_of_their_tokens():
    times = ClipTimes.from_tokens(TIME, IS_CLEAN, LAYOUT)
    np.testing.assert_array_equal(times.expand(LAYOUT)[SEGMENTS > 0], TIME[SEGMENTS > 0])
    spread = np.asarray(times.distinct)[0][np.maximum(np.asarray(times.get_numbers(LAYOUT))[0] - 1, 0)]
    np.testing.assert_array_equal(spread[SEGMENTS[0] > 0], TIME[0][SEGMENTS[0] > 0])


@pytest.mark.parametrize("name", mark_slow_except(["wan"], MODELS))
def test_a_model_predicts_the_same_from_the_times_of_clips_as_from_those_of_tokens(name):
    config = MODELS[name]
    params = make_random_params(config.make)
    grouped = jax.jit(lambda params: predict(config, params, is_clean=IS_CLEAN))(params)
    per_token = jax.jit(lambda params: predict(config, params, is_clean=None))(params)
    np.testing.assert_allclose(grouped, per_token, atol=2e-6)
    if name == "wan":  # a mask makes a difference
        none = jax.jit(lambda params: predict(config, params, is_clean=jnp.zeros_like(IS_CLEAN)))(params)
        assert np.abs(none - per_token).max() > 1e-3


def list_shapes(jaxpr):
    """Return the shapes of all results in a program, and in the programs that it calls."""
    inner = [leaf for equation in jaxpr.eqns for leaf in jax.tree.leaves(list(equation.params.values()))]
    shapes = [value.aval.shape for equation in jaxpr.eqns for value in equation.outvars]
    return shapes + [shape for each in inner if hasattr(each, "jaxpr") for shape in list_shapes(each.jaxpr)]


@pytest.mark.parametrize("name", MODELS)
def test_modulations_are_projected_for_each_time_and_not_for_each_token(name):
    config = MODELS[name]
    params = jax.eval_shape(lambda: make_random_params(config.make))
    counts = {}
    for kind, is_clean in (("grouped", IS_CLEAN), ("per token", None)):
        program = jax.make_jaxpr(functools.partial(predict, config, is_clean=is_clean))(params)
        shapes = {shape for shape in list_shapes(program.jaxpr) if len(shape) == 2} - {(config.width, 6 * config.width)}
        counts[kind] = max(rows for rows, columns in shapes if columns == 6 * config.width)
    assert counts["grouped"] == 2 * LAYOUT.count < TOKENS <= counts["per token"]
