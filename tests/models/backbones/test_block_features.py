"""Features of a model's blocks, beside an unchanged prediction."""

import jax
import numpy as np
import pytest
from flax import nnx

from dit_video.core.errors import UserError
from dit_video.models.backbones.block_features import BlockFeatures, check_blocks
from dit_video.models.backbones.dit import DiTConfig
from dit_video.models.backbones.ltx import LtxDitConfig
from dit_video.models.backbones.mmdit import MMDiTConfig
from dit_video.models.backbones.spatio_temporal import SpatioTemporalDiTConfig, TemporalLayers
from dit_video.models.backbones.unet import UnetConfig
from dit_video.models.backbones.vace import VaceDitConfig
from dit_video.models.backbones.wan import WanDitConfig
from dit_video.nn import get_graph_def
from dit_video.nn.attention import CausalFrames, Full
from dit_video.tokens import Grid
from support.marks import mark_slow_except
from support.packed_rows import TEXT_WIDTH, make_batch
from support.random_params import make_random_params

_SIZES = {"channels": 2, "context_width": TEXT_WIDTH, "width": 24, "layers": 4, "heads": 2, "attention": "dense"}
MODELS = {
    "dit": DiTConfig(**_SIZES, registers=2, remat="full"),
    "mmdit": MMDiTConfig(**_SIZES, pattern=(Full(), CausalFrames())),
    "spatio-temporal": SpatioTemporalDiTConfig(**_SIZES, temporal=TemporalLayers(spatial_layers=2)),
    "wan": WanDitConfig(**_SIZES, mlp_dim=48, text_length=5, time_width=8),
    "ltx": LtxDitConfig(**_SIZES, patch=Grid(1, 2, 2), time="segment"),
}


@pytest.mark.parametrize("name", mark_slow_except(["dit"], MODELS))
def test_features_are_the_clips_tokens_behind_the_blocks_of_the_same_prediction(name):
    config = MODELS[name]
    params, graph, batch = make_random_params(config.make), get_graph_def(config.make), make_batch((0, 1), (1, 0))
    inputs = batch.noisy, batch.get_time(config), batch.layout, batch.get_conditioning(config)

    @jax.jit
    def predict(params):
        return BlockFeatures(nnx.merge(graph, params), (3, 0))(*inputs)

    @jax.jit
    def collect(params):
        model = nnx.merge(graph, params)
        x, own = model.embed_inputs(*inputs)

        def return_tokens(block, x, own, attention, values):
            x = block(x, own, attention)
            return x, x

        last, tokens = model.apply_blocks(x, own, wrapper=return_tokens)
        return model(*inputs)[0], {0: tokens[0], 3: last}

    (prediction, features), (expected, tokens) = predict(params), collect(params)
    np.testing.assert_allclose(prediction, expected, atol=1e-5)
    assert list(features) == [0, 3]
    for block, values in features.items():
        np.testing.assert_allclose(values, tokens[block][:, : batch.noisy.shape[1]], atol=1e-5)


def test_models_without_such_blocks_are_refused():
    drawing = type("Drawing", (DiTConfig,), {"draws_in_training": True})
    unet = UnetConfig(channels=2, context_width=6, width=8, heads=1)
    for config, block, match in (
        (MODELS["dit"], 4, r"blocks=\[4\] is invalid: DiTConfig has 4. Use 0 to 3"),
        (MODELS["dit"], -1, r"blocks=\[-1\] is invalid"),
        (VaceDitConfig(), 0, "VaceDitConfig applies all blocks at once"),
        (drawing(**_SIZES), 0, "draws in training"),
        (unet, 0, r"UnetConfig is not made of equal blocks. Use blocks=\(\)"),
    ):
        with pytest.raises(UserError, match=match):
            check_blocks(config, (block,))
    for config in MODELS.values():
        check_blocks(config, (0, 3))
