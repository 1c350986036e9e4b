"""Patterns in a whole denoiser: which token influences which, and equality with explicit masks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_video.models.backbones.dit import DiTConfig
from dit_video.models.backbones.mmdit import MMDiTConfig
from dit_video.models.backbones.wan import WanDitConfig
from dit_video.nn import Partitioner
from dit_video.nn.attention import CausalFrames, SlidingWindow, SpaceOnly, SparseCausal, TimeOnly
from support.packed_rows import (
    FIRST,
    TEXT_WIDTH,
    TOKENS,
    assert_trees_are_close,
    make_batch,
    predict,
    predict_with_gradients,
)
from support.random_params import make_random_params

CONFIG = DiTConfig(channels=2, context_width=TEXT_WIDTH, width=24, layers=2, heads=2, mlp_ratio=2.0)
WAN = WanDitConfig(
    channels=2, context_width=TEXT_WIDTH, text_length=5, width=24, mlp_dim=40, layers=2, heads=2, time_width=32
)
FRAME, PLACE = np.arange(8) // 4, np.arange(8) % 4
SAME_FRAME, SAME_PLACE = FRAME[:, None] == FRAME, PLACE[:, None] == PLACE
NOT_LATER, ALL = FRAME[:, None] >= FRAME, np.ones((8, 8), bool)
JOINT = MMDiTConfig(channels=2, context_width=TEXT_WIDTH, width=24, layers=2, heads=2, mlp_ratio=2.0)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        pytest.param(dataclasses.replace(CONFIG, pattern=SpaceOnly()), SAME_FRAME, marks=pytest.mark.slow),
        (dataclasses.replace(CONFIG, pattern=TimeOnly()), SAME_PLACE),
        (dataclasses.replace(CONFIG, pattern=(SpaceOnly(), TimeOnly())), ALL),
        pytest.param(dataclasses.replace(CONFIG, pattern=SpaceOnly(), registers=1), ALL, marks=pytest.mark.slow),
        (dataclasses.replace(CONFIG, pattern=CausalFrames(), registers=1), NOT_LATER),
        pytest.param(dataclasses.replace(JOINT, pattern=SpaceOnly()), ALL, marks=pytest.mark.slow),
        pytest.param(
            dataclasses.replace(JOINT, pattern=(SpaceOnly(), SparseCausal())),
            NOT_LATER,
            marks=pytest.mark.slow,
        ),
        (dataclasses.replace(WAN, pattern=CausalFrames()), NOT_LATER),
    ],
    ids=lambda value: str(value.pattern) if hasattr(value, "pattern") else "",
)
def test_a_token_depends_on_exactly_the_tokens_that_its_layers_see(config, expected):
    params = make_random_params(config.make)
    batch = make_batch(*[(0, 1)] * 9)
    # The first row is as it was; in each of the others one token of the first clip is another.
    one = jnp.arange(1, 9)
    after = predict(params, batch._replace(noisy=batch.noisy.at[one, one - 1].add(1.0)), config)[:, FIRST]
    change = np.abs(after[1:] - after[0]).max(axis=-1).T
    assert (change[expected] > 1e-4).all()
    assert (change[~expected] < 1e-6).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "masks"),
    [
        (
            dataclasses.replace(CONFIG, pattern=(SpaceOnly(), SlidingWindow(radius=(None, 0, 0))), attention="chunked"),
            [lambda q, k: q[0] == k[0], lambda q, k: tuple(q[1:]) == tuple(k[1:])],
        ),
        (dataclasses.replace(CONFIG, pattern=CausalFrames(), registers=1), [lambda q, k: k[0] <= q[0]]),
        (dataclasses.replace(JOINT, pattern=CausalFrames()), [lambda q, k: k[0] <= q[0]]),
    ],
    ids=["factorised", "causal", "joint"],
)
def test_patterns_are_their_dense_masks_in_values_and_gradients(monkeypatch, config, masks):
    params, batch = make_random_params(config.make), make_batch((0, 1), (1, 0))
    result = predict_with_gradients(params, batch, config)
    explicit = iter([_explicit(batch, config, sees) for sees in masks])
    monkeypatch.setattr(Partitioner, "make_attention", lambda *_: next(explicit))
    # Another config, so that nothing that is traced already serves; with it layers are scanned in groups.
    expected = predict_with_gradients(params, batch, dataclasses.replace(config, remat="full"))
    np.testing.assert_allclose(result[0][:, :14], expected[0][:, :14], atol=1e-5)
    assert_trees_are_close(result[1], expected[1])
    np.testing.assert_allclose(result[2], expected[2], atol=2e-5)


def _explicit(batch, config, sees):
    """Attention of JAX with an explicit mask of all pairs."""
    coordinates, ids = np.asarray(batch.positions), np.asarray(batch.segments)
    if config.registers:
        ids = np.concatenate([ids, np.tile(np.arange(1, 4), (2, 1))], axis=1)
    if isinstance(config, MMDiTConfig):
        ids = np.concatenate([ids, np.asarray(batch.context_segments)], axis=1)

    def visible(row, q, k):
        if not ids[row, q] == ids[row, k] > 0:
            return False
        if q >= TOKENS:  # what lies nowhere sees its like, as the pattern is causal
            return k >= TOKENS
        return k >= TOKENS or bool(sees(coordinates[row, q], coordinates[row, k]))

    total = range(ids.shape[1])
    mask = np.array([[[visible(row, q, k) for k in total] for q in total] for row in range(2)])

    def attend(q, k, v, _):
        mixed = jax.nn.dot_product_attention(q, k, v, mask=jnp.asarray(mask)[:, None])
        return jnp.where(mask.any(axis=-1)[..., None, None], mixed, 0)

    return attend
