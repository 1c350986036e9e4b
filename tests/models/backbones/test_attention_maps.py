"""Attention maps of a denoiser."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from dit_video.core.errors import UserError
from dit_video.models.backbones.attention_maps import compute_attention_maps
from dit_video.models.backbones.dit import DiTConfig
from dit_video.models.backbones.mmdit import MMDiTConfig
from dit_video.models.backbones.spatio_temporal import SpatioTemporalDiTConfig
from dit_video.models.backbones.wan import WanDitConfig
from dit_video.nn import get_graph_def
from dit_video.nn.attention import CausalFrames, SpaceOnly
from support.packed_rows import TEXT_WIDTH, TOKENS, make_batch, predict
from support.random_params import make_random_params

SLOW = pytest.mark.slow

SIZES = {"channels": 2, "context_width": TEXT_WIDTH, "width": 24, "layers": 2, "heads": 2, "mlp_ratio": 2.0}
CONFIG = DiTConfig(**SIZES)
WAN = WanDitConfig(
    channels=2, context_width=TEXT_WIDTH, text_length=5, width=24, mlp_dim=40, layers=2, heads=2, time_width=32
)
FRAME = np.arange(8) // 4
"""Queries among the tokens of the first clip."""


def maps(config, params, queries, batch=None):
    batch = make_batch((0, 1)) if batch is None else batch
    backbone = nnx.merge(get_graph_def(config.make), params)
    return compute_attention_maps(
        backbone,
        batch.noisy,
        batch.get_time(config),
        batch.layout,
        batch.get_conditioning(config),
        queries=queries,
    )


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("config", "layers", "others"),
    [
        (CONFIG, 2, 0),
        pytest.param(dataclasses.replace(CONFIG, remat="full", attention="chunked"), 2, 0, marks=SLOW),
        pytest.param(dataclasses.replace(CONFIG, registers=1), 2, 3, marks=pytest.mark.slow),
        pytest.param(MMDiTConfig(**SIZES), 2, 7, marks=pytest.mark.slow),
        pytest.param(SpatioTemporalDiTConfig(**SIZES), 4, 0, marks=pytest.mark.slow),
        pytest.param(WAN, 2, 0, marks=pytest.mark.slow),
    ],
    ids=["plain", "recomputed", "registers", "joint", "temporal", "wan"],
)
def test_attention_weights_of_a_query_sum_to_one_within_its_clip(config, layers, others):
    params = make_random_params(config.make)
    result = maps(config, params, [2, 9, TOKENS - 1])
    assert result.shape == (layers, 1, 2, 3, TOKENS + others)
    np.testing.assert_allclose(result[..., :2, :].sum(axis=-1), 1, atol=1e-5)
    assert (result[..., 0, 8:TOKENS] == 0).all()
    assert (result[..., 1, :8] == 0).all()
    assert (result[..., 2, :] == 0).all()  # padding
    assert result[..., 0, :8].max() > result[..., 0, :8].min()


@pytest.mark.nightly
def test_a_map_shows_what_a_layer_does_not_see():
    config = dataclasses.replace(CONFIG, pattern=(SpaceOnly(), CausalFrames()))
    result = maps(config, make_random_params(config.make), list(range(8)))[:, 0, :, :, :8]
    assert (result[0][:, FRAME[:, None] != FRAME] == 0).all()
    assert (result[0][:, FRAME[:, None] == FRAME] > 0).all()
    assert (result[1][:, FRAME[:, None] < FRAME] == 0).all()
    assert (result[1][:, FRAME[:, None] >= FRAME] > 0).all()


@pytest.mark.nightly
def test_recording_attention_does_not_change_predictions():
    params, batch = make_random_params(CONFIG.make), make_batch((0, 1))
    before = predict(params, batch, CONFIG)
    backbone = nnx.merge(get_graph_def(CONFIG.make), params)
    maps(CONFIG, params, [0])
    assert nnx.graphdef(backbone) == get_graph_def(CONFIG.make)
    np.testing.assert_array_equal(jax.block_until_ready(predict(params, batch, CONFIG)), before)


def test_queries_name_tokens_of_a_row():
    with pytest.raises(UserError, match="0 to 17"):
        maps(CONFIG, make_random_params(CONFIG.make), [18])
