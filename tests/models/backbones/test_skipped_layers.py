"""A model without some layers equals one that has only the others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dit_video.core.errors import UserError
from dit_video.models.backbones.dit import DiTConfig
from dit_video.models.backbones.mmdit import MMDiTConfig
from dit_video.models.backbones.skipped_layers import skip_layers
from dit_video.models.backbones.unet import UnetConfig
from dit_video.models.backbones.wan import WanDitConfig
from dit_video.models.conditioning import Conditioning, TextTokens
from dit_video.nn import get_graph_def
from dit_video.tokens import Grid, PackedRows, compute_positions
from support.random_params import make_random_params

SIZES = {"channels": 2, "context_width": 6, "width": 24, "layers": 4, "heads": 2, "attention": "dense"}
MODELS = {
    "wan": WanDitConfig(mlp_dim=32, text_length=4, time_width=8, **SIZES),
    "joint": MMDiTConfig(mlp_ratio=2.0, **SIZES),
    "rematerialized": DiTConfig(mlp_ratio=2.0, remat="full", **SIZES),
}
GRID, TEXT = Grid(2, 2, 2), 3
DRAW = np.random.default_rng(0)
ARGUMENTS = (
    jnp.asarray(DRAW.normal(size=(1, GRID.volume, 8)), jnp.float32),
    jnp.full((1, 1), 0.6),
    PackedRows(segments=np.ones((1, GRID.volume), np.int32), positions=compute_positions(GRID)[None], count=1),
    Conditioning(TextTokens(jnp.asarray(DRAW.normal(size=(1, TEXT, 6)), jnp.float32), jnp.ones((1, TEXT), jnp.int32))),
)


@pytest.mark.nightly
@pytest.mark.parametrize("name", MODELS)
def test_a_model_without_layers_equals_one_that_has_only_the_others(name):
    config, layers = MODELS[name], np.asarray([0, 2], np.int32)
    params = make_random_params(config.make)
    remaining = [number for number in range(config.layers) if number not in layers]
    short = config.replace(layers=len(remaining))
    short_params = params | {"blocks": jax.tree.map(lambda leaf: leaf[np.asarray(remaining)], params["blocks"])}
    expected = jax.jit(lambda params: nnx.merge(get_graph_def(short.make), params)(*ARGUMENTS)[0])(short_params)

    @jax.jit
    def predict(params, layers):
        return skip_layers(nnx.merge(get_graph_def(config.make), params), layers)(*ARGUMENTS)[0]

    np.testing.assert_allclose(predict(params, layers), expected, atol=1e-5)
    # The same program serves other layers.
    assert np.abs(predict(params, layers + 1) - expected).max() > 1e-3
    assert predict._cache_size() == 1


def test_a_model_that_is_not_made_of_equal_blocks_is_refused():
    config = UnetConfig(channels=2, context_width=6, width=8, heads=1)
    backbone = nnx.merge(get_graph_def(config.make), make_random_params(config.make))
    with pytest.raises(UserError, match=r"Unet is not made of equal blocks. Use skip_layers=None"):
        skip_layers(backbone, np.asarray([0]))
