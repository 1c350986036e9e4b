"""U-Net: a clip has one result, alone or on a canvas with others, and gradients that its neighbours do not change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dit_video.core.errors import UserError
from dit_video.models.backbones.flops import count_forward_flops
from dit_video.models.backbones.protocol import Backbone
from dit_video.models.backbones.unet import UnetConfig
from dit_video.models.conditioning import Conditioning, TextTokens
from dit_video.nn import get_graph_def, get_param_shapes, init_params
from dit_video.tokens import (
    Canvas,
    CanvasShape,
    DenseShape,
    Grid,
    LayoutShape,
    PackedExample,
    compute_positions,
    pack,
    stack_rows,
    unpack,
)
from support.random_params import make_random_params

CONFIG = UnetConfig(
    channels=3, context_width=6, width=8, multipliers=(1, 2), blocks=1, heads=2, groups=4, attention="dense"
)
GRIDS = (Grid(3, 4, 4), Grid(2, 4, 6), Grid(1, 6, 4))
CANVAS = CanvasShape(
    size=Grid(4, 12, 16), text=16, segments=4, cell=CONFIG.size_multiple, padding=CONFIG.canvas_padding
)
PARAMS = make_random_params(CONFIG.make)


def make_example(index: int) -> PackedExample:
    generator, grid = np.random.default_rng(index), GRIDS[index]
    tokens, text = generator.normal(size=(grid.volume, 3)), generator.normal(size=(2 + index, 6))
    return PackedExample(tokens.astype(np.float32), compute_positions(grid), text.astype(np.float32), index)


@jax.jit
def predict(params, batch):
    model = nnx.merge(get_graph_def(CONFIG.make), params)
    time = (batch.examples.astype(jnp.float32) + 1) / 4
    conditioning = Conditioning(TextTokens(batch.text, batch.text_segments))
    return model(batch.tokens, time, batch.layout, conditioning)[0]


def run(indices: tuple[int, ...], shape: LayoutShape) -> list[np.ndarray]:
    """Return the prediction of each clip, all of them in one array."""
    row = pack([make_example(index) for index in indices], shape, width=3, text_width=6)
    prediction = np.asarray(predict(PARAMS, jax.device_put(stack_rows([row]))))[0]
    return unpack(prediction, row.segments)


@pytest.mark.slow
def test_a_clip_alone_and_on_a_shared_canvas_has_equal_outputs():
    together = run((0, 1, 2), CANVAS)
    for index, expected in enumerate(together):
        assert np.abs(expected).max() > 0.1
        np.testing.assert_allclose(run((index,), DenseShape(size=GRIDS[index], text=16))[0], expected, atol=1e-5)
        np.testing.assert_allclose(run((index,), CANVAS)[0], expected, atol=1e-5)


@jax.jit
@jax.grad
def compute_gradient(params, batch):
    """Return the gradient of the first clip's squared prediction."""
    return jnp.where((batch.segments == 1)[..., None], jnp.square(predict(params, batch)), 0).sum()


@pytest.mark.slow
def test_the_gradient_of_a_clip_does_not_depend_on_its_neighbours():
    def gradient(indices, shape):
        row = pack([make_example(index) for index in indices], shape, width=3, text_width=6)
        return compute_gradient(PARAMS, jax.device_put(stack_rows([row])))

    alone, together = gradient((0,), DenseShape(size=GRIDS[0], text=16)), gradient((0, 1, 2), CANVAS)
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(alone))
    for one, other in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
        np.testing.assert_allclose(other, one, atol=1e-5 * scale)


@pytest.mark.nightly
def test_every_input_and_the_text_change_the_prediction():
    base = run((0,), DenseShape(size=GRIDS[0], text=16))[0]
    row = pack([make_example(0)], DenseShape(size=GRIDS[0], text=16), width=3, text_width=6)
    for changed in (
        row._replace(tokens=-row.tokens),
        row._replace(text=-row.text),
        row._replace(examples=row.examples + 1),
    ):
        prediction = np.asarray(predict(PARAMS, jax.device_put(stack_rows([changed]))))[0]
        assert np.abs(prediction - base).max() > 1e-2


@pytest.mark.nightly
def test_a_new_model_predicts_zero():
    model = nnx.merge(get_graph_def(CONFIG.make), jax.jit(lambda key: init_params(CONFIG.make, key))(jax.random.key(0)))
    assert isinstance(model, Backbone)
    grid = Grid(1, 4, 4)
    layout = DenseShape(size=grid, text=1).make_layout(jnp.ones((1, 16), jnp.int32), jnp.zeros((1, 16, 3)))
    text = TextTokens(jnp.ones((1, 1, 6)), jnp.ones((1, 1), jnp.int32))
    prediction, state = nnx.jit(model)(jnp.ones((1, 16, 3)), jnp.ones((1, 1)), layout, Conditioning(text))
    assert not prediction.any()
    assert state is None


def test_counted_flops_equal_those_of_xla():
    config = UnetConfig(channels=8, context_width=64, width=128, multipliers=(1, 2), heads=2, attention="dense")
    grid = Grid(4, 8, 8)
    shapes = get_param_shapes(config.make)
    batch = {
        "noisy": jax.ShapeDtypeStruct((1, grid.volume, 8), jnp.float32),
        "time": jax.ShapeDtypeStruct((1, 1), jnp.float32),
        "layout": DenseShape(size=grid, text=16).make_layout(
            jnp.ones((1, grid.volume), jnp.int32), jnp.asarray(compute_positions(grid))[None]
        ),
        "conditioning": Conditioning(
            TextTokens(jax.ShapeDtypeStruct((1, 16, 64), jnp.float32), jnp.ones((1, 16), jnp.int32))
        ),
    }
    lowered = jax.jit(lambda params, batch: nnx.merge(get_graph_def(config.make), params)(**batch)[0]).lower(
        shapes, batch
    )
    counted = count_forward_flops(config, [grid.volume], [16])
    # XLA leaves out the products with zeros beyond the border.
    assert 0.75 * counted < lowered.cost_analysis()["flops"] < 1.05 * counted


def test_invalid_configs_are_refused():
    for changes, message in (
        ({"multipliers": ()}, "at least one level"),
        ({"attention_levels": (2,)}, "numbered from 0 to 1"),
        ({"groups": 3}, "groups=3 is invalid: it must divide width=8"),
        ({"patch": Grid(1, 2, 2)}, "has no patches"),
    ):
        with pytest.raises(UserError, match=message):
            CONFIG.replace(**changes)
    assert CONFIG.layouts[1] is Canvas
