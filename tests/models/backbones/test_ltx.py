"""LTX-Video's transformer: rotary angles, costs, sharding, times and errors."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from dit_video.core.errors import UserError
from dit_video.core.trees import flatten
from dit_video.distributed.sharding import DEFAULT_RULES
from dit_video.models.backbones.ltx import LtxDitConfig, compute_fraction_angles
from dit_video.models.conditioning import Conditioning, TextTokens
from dit_video.nn import get_graph_def, get_param_shapes
from dit_video.tokens import Grid, PackedRows, compute_positions
from support.random_params import make_random_params
from support.tiny_ltx import DIT

GRID = Grid(2, 1, 2)


def test_angles_are_fractions_of_a_quarter_turn_for_half_an_extent():
    """The first of 16 pairs is not rotated: three axes share the others, from the lowest frequency on."""
    positions = jnp.asarray([[[0.0, 32.0, 64.0], [20.0, 0.0, 0.0]]])
    angles = np.asarray(compute_fraction_angles(positions, (20.0, 64.0, 64.0), width=32))[0]
    assert angles.shape == (2, 16)
    np.testing.assert_array_equal(angles[:, 0], 0)
    quarter = math.pi / 2
    np.testing.assert_allclose(angles[0, 1:4], [-quarter, 0, quarter], rtol=1e-6)
    np.testing.assert_allclose(angles[0, 13:], [-10_000 * quarter, 0, 10_000 * quarter], rtol=1e-5)
    np.testing.assert_allclose(angles[1, 1:4], [quarter, -quarter, -quarter], rtol=1e-6)


@functools.cache
def make_program(config):
    model = nnx.merge(get_graph_def(config.make), make_random_params(config.make))
    return jax.jit(lambda *inputs: model(*inputs)[0])


def predict(config, time, positions):
    layout = PackedRows(segments=jnp.ones((1, 4), jnp.int32), positions=positions, count=1)
    draw = np.random.default_rng(0)
    noisy, text = draw.normal(size=(1, 4, 4)), draw.normal(size=(1, 3, config.context_width))
    conditioning = Conditioning(TextTokens(jnp.asarray(text, jnp.float32), jnp.ones((1, 3), jnp.int32)))
    return np.asarray(make_program(config)(jnp.asarray(noisy, jnp.float32), time, layout, conditioning))


@pytest.mark.nightly
def test_a_time_per_segment_is_that_of_all_its_tokens():
    positions = jnp.asarray(compute_positions(GRID)[None])
    per_token = predict(DIT, jnp.full((1, 4), 0.3), positions)
    per_segment = predict(DIT.replace(time="segment"), jnp.full((1, 1), 0.3), positions)
    np.testing.assert_allclose(per_segment, per_token, atol=1e-5)
    assert np.abs(predict(DIT, jnp.asarray([[0.0, 0.0, 0.3, 0.3]]), positions) - per_token).max() > 1e-3
    assert np.abs(predict(DIT, jnp.full((1, 4), 0.3), 2 * positions) - per_token).max() > 1e-4


def test_published_sizes_have_their_numbers_of_parameters():
    for config, billions in ((LtxDitConfig.ltx_2b(), 1.92), (LtxDitConfig.ltx_13b(), 13.04)):
        count = sum(math.prod(leaf.shape) for leaf in flatten(get_param_shapes(config.make)).values())
        assert count / 1e9 == pytest.approx(billions, abs=0.01)


def test_multiplications_are_those_of_the_compiled_program():
    """All products of the forward pass of one clip: XLA counts two operations for each."""
    config = DIT.replace(attention="dense")
    shapes, text = get_param_shapes(config.make), 3
    graph = get_graph_def(config.make)

    def run(params, noisy, time, positions, context):
        layout = PackedRows(segments=jnp.ones((1, 4), jnp.int32), positions=positions, count=1)
        conditioning = Conditioning(TextTokens(context, jnp.ones((1, text), jnp.int32)))
        return nnx.merge(graph, params)(noisy, time, layout, conditioning)[0]

    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 4, 4), (1, 4), (1, 4, 3), (1, text, 16))]
    jaxpr = jax.make_jaxpr(run)(shapes, *inputs)
    assert count_multiplications(jaxpr.jaxpr) == config.count_multiplications(GRID, text=text, image=0)
    with pytest.raises(UserError, match="reads no image tokens"):
        config.count_multiplications(GRID, text=text, image=1)


def count_multiplications(jaxpr):
    """Count those of matrix products, in loops as often as they run."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
        repeats = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for inner in jaxprs_in_params(equation.params):
            total += repeats * count_multiplications(inner)
    return total


def test_maps_into_and_out_of_heads_are_sharded():
    axes = {
        path: DEFAULT_RULES.get_tensor_axis(path)
        for path in flatten(get_param_shapes(DIT.make))
        if path.startswith("blocks/") and path.endswith("kernel")
    }
    outputs = {"query", "key", "value", "cross_query", "cross_key", "cross_value", "up"}
    expected = {f"blocks/{name}/kernel": -1 for name in outputs}
    expected |= {f"blocks/{name}/kernel": -2 for name in ("out", "cross_out", "down")}
    assert axes == expected


def test_configs_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="width 16 must be divisible by its 3 heads"):
        DIT.replace(heads=3)
    with pytest.raises(UserError, match=r"extents=\(0\.0, .*\) is invalid: .* Use \(20, 64, 64\)"):
        DIT.replace(extents=(0.0, 64.0, 64.0))
