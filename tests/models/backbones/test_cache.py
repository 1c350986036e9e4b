"""Frames that are computed one after the other, with keys and values of earlier ones in the state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dit_video.core.errors import UserError
from dit_video.models.backbones.dit import DiTConfig
from dit_video.models.backbones.positions import BoundaryEmbedding, SineCosine
from dit_video.models.backbones.protocol import BlockBackbone, CachingBackbone
from dit_video.models.conditioning import Conditioning, TextTokens
from dit_video.nn import get_graph_def
from dit_video.nn.attention import CausalFrames, Full, RelativeBias, SparseCausal
from dit_video.tokens import PackedRows
from support.random_params import make_random_params

FRAMES, SIZES = 4, (4, 3)
"""Frames of two clips in a row, and the numbers of tokens in a frame of each."""
FIELDS = {"channels": 2, "context_width": 6, "width": 24, "layers": 2, "heads": 2, "mlp_ratio": 2.0, "time": "token"}
FIELDS |= {"pattern": CausalFrames(), "absolute_position": None}


def make_frames(first: int, last: int):
    """Return noisy tokens and the layout of some frames of both clips, followed by a token of padding."""
    draw = np.random.default_rng(0)
    noisy = [draw.normal(size=(FRAMES, size, 8)) for size in SIZES]
    positions = [
        np.stack([np.repeat(np.arange(FRAMES) / 3, size), *np.zeros((1, FRAMES * size)), np.tile(range(size), FRAMES)])
        for size in SIZES
    ]
    noisy = [values[first:last].reshape(-1, 8) for values in noisy]
    positions = [each.T.reshape(FRAMES, -1, 3)[first:last].reshape(-1, 3) for each in positions]
    segments = np.repeat([1, 2, 0], [*map(len, noisy), 1])
    rows = [np.concatenate([*parts, np.ones((1, parts[0].shape[1]))])[None] for parts in (noisy, positions)]
    layout = PackedRows(segments=jnp.asarray(segments)[None], positions=jnp.float32(rows[1]), count=2)
    return jnp.float32(rows[0]), layout


TEXT = TextTokens(jnp.float32(np.random.default_rng(1).normal(size=(1, 3, 6))), jnp.asarray([[1, 2, 2]]))


def make_model(config):
    return nnx.merge(get_graph_def(config.make), make_random_params(config.make))


@pytest.mark.nightly
@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"pattern": (CausalFrames(chunk=2), SparseCausal()), "absolute_position": SineCosine(), "remat": "full"},
        pytest.param({"attention": "chunked"}, marks=pytest.mark.slow),
    ],
    ids=["causal", "turns", "chunked"],
)
def test_a_chunk_after_cached_ones_is_predicted_as_in_the_whole_clip(fields):
    model, conditioning, size = make_model(DiTConfig(**FIELDS | fields)), Conditioning(TEXT), 2
    assert isinstance(model, BlockBackbone)
    assert isinstance(model, CachingBackbone)

    @jax.jit
    def continue_clips(state, noisy, layout):
        prediction, after = model(noisy, jnp.full(noisy.shape[:2], 0.7), layout, conditioning, state)
        return prediction, after, model.extend(state, noisy, layout, conditioning)

    @jax.jit
    def predict_whole(noisy, time, layout):
        return model(noisy, time, layout, conditioning)[0]

    state = model.init_state(1, sum(SIZES) * FRAMES + 2)
    for first in range(0, FRAMES, size):
        noisy, layout = make_frames(0, first + size)
        is_last = layout.positions[..., 0] * 3 > first - 0.5
        expected = predict_whole(noisy, jnp.where(is_last, 0.7, 0.0), layout)
        chunk, chunk_layout = make_frames(first, first + size)
        result, same, extended = continue_clips(state, chunk, chunk_layout)
        mask = np.asarray(is_last & (layout.segments > 0))[0]
        np.testing.assert_allclose(result[0, :-1], expected[0][mask], atol=1e-5)
        jax.tree.map(np.testing.assert_array_equal, same, state)
        state = extended
    full, _, _ = continue_clips(state, chunk, chunk_layout)
    overfull = continue_clips(continue_clips(state, chunk, chunk_layout)[2], chunk, chunk_layout)[0]
    assert np.isfinite(full[0, :-1]).all()
    assert np.isnan(overfull[0, :-1]).all()


@pytest.mark.parametrize(
    "fields",
    [
        {"pattern": Full()},
        {"absolute_position": BoundaryEmbedding()},
        {"registers": 1},
        {"relative_bias": RelativeBias()},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_a_model_whose_finished_frames_depend_on_later_ones_has_no_cache(fields):
    with pytest.raises(UserError, match="absolute_position=None, registers=0"):
        make_model(DiTConfig(**FIELDS | fields)).init_state(1, 8)
