import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_video.core import config_json
from dit_video.core.errors import UserError
from dit_video.core.platform.devices import Platform
from dit_video.nn.attention import (
    GLOBAL,
    AttentionInputs,
    CausalFrames,
    Full,
    SlidingWindow,
    SpaceOnly,
    SparseCausal,
    SplashBlocks,
    TimeOnly,
    WithGlobalTokens,
    check_attention,
    check_platform,
    compute_grid_indices,
    count_pairs,
    make_attention,
)
from dit_video.nn.attention.masks import dense_mask, mask_boxes
from dit_video.tokens import Grid, compute_positions

GRIDS = Grid(3, 2, 3), Grid(2, 3, 2), Grid(1, 2, 2)
SEGMENTS = jnp.asarray([[index + 1 for index, grid in enumerate(GRIDS) for _ in range(grid.volume)] + [0] * 3])
INDICES = np.concatenate([*(compute_positions(grid) for grid in GRIDS), np.zeros((3, 3))]).astype(np.int32)

TILE = np.array([1, 2, 2])
DEFINITIONS = [
    (Full(), lambda q, k: True),
    (SpaceOnly(), lambda q, k: q[0] == k[0]),
    (TimeOnly(), lambda q, k: tuple(q[1:]) == tuple(k[1:])),
    (CausalFrames(), lambda q, k: k[0] <= q[0]),
    (CausalFrames(chunk=2), lambda q, k: k[0] // 2 <= q[0] // 2),
    (SparseCausal(), lambda q, k: k[0] in (q[0], q[0] - 1, 0)),
    (SlidingWindow(radius=(1, 1, 1)), lambda q, k: max(abs(q - k)) <= 1),
    (SlidingWindow(radius=(None, 0, 1)), lambda q, k: q[1] == k[1] and abs(q[2] - k[2]) <= 1),
    (SlidingWindow(radius=(1, None, 0), tile=(2, 1, 2)), lambda q, k: q[2] // 2 == k[2] // 2),
    (SlidingWindow(radius=(1, 0, 0), tile=(1, 2, 2)), lambda q, k: (abs(q // TILE - k // TILE) <= [1, 0, 0]).all()),
]


def expected_mask(sees):
    """Return the mask of a pattern, pair by pair, from its definition."""
    ids = np.asarray(SEGMENTS)[0]
    return np.array(
        [[ids[i] == ids[j] > 0 and sees(q, k) for j, k in enumerate(INDICES)] for i, q in enumerate(INDICES)]
    )


@pytest.mark.parametrize("pattern", [pattern for pattern, _ in DEFINITIONS], ids=str)
def test_counted_pairs_are_those_of_the_dense_mask(pattern):
    for grid in (Grid(5, 3, 4), *GRIDS):
        inputs = AttentionInputs.self_attention(
            jnp.ones((1, grid.volume), jnp.int32), jnp.asarray(compute_positions(grid), jnp.int32)[None]
        )
        assert count_pairs(pattern, grid) == int(dense_mask(mask_boxes(pattern, inputs)).sum())


@pytest.mark.parametrize(("pattern", "sees"), DEFINITIONS, ids=lambda value: str(value) if "(" in str(value) else "")
def test_every_pattern_allows_the_pairs_of_its_definition(pattern, sees):
    mask = dense_mask(mask_boxes(pattern, AttentionInputs.self_attention(SEGMENTS, jnp.asarray(INDICES)[None])))
    np.testing.assert_array_equal(mask[0], expected_mask(sees))


REGISTER = INDICES[:, 1] + INDICES[:, 2] == 2
"""Tokens that have no coordinates."""


@pytest.mark.parametrize("seeing", [True, False])
@pytest.mark.parametrize("number", [1, 3, 5, 6], ids=lambda number: type(DEFINITIONS[number][0]).__name__)
def test_global_tokens_are_seen_by_all_and_see_all_or_only_each_other(number, seeing):
    pattern, sees = DEFINITIONS[number]
    indices = np.where(REGISTER[:, None], GLOBAL, INDICES)
    ids = np.asarray(SEGMENTS)[0]
    expected = [
        [
            ids[i] == ids[j] > 0 and (REGISTER[j] or (seeing if REGISTER[i] else bool(sees(INDICES[i], INDICES[j]))))
            for j in range(len(ids))
        ]
        for i in range(len(ids))
    ]
    extended = WithGlobalTokens(pattern=pattern, globals_see_all=seeing)
    mask = dense_mask(mask_boxes(extended, AttentionInputs.self_attention(SEGMENTS, jnp.asarray(indices)[None])))
    np.testing.assert_array_equal(mask[0], expected)
    assert extended.causal == (pattern.causal and not seeing)


def test_real_coordinates_are_indices_by_rank():
    seconds = INDICES * np.float32([0.32, 1 / 3, 7.5]) + np.float32([0, -4, 0.1])
    order = np.random.default_rng(0).permutation(len(INDICES))
    for rows in (np.arange(len(INDICES)), order):
        result = jax.jit(compute_grid_indices)(jnp.asarray(seconds[rows])[None], SEGMENTS[:, rows])
        np.testing.assert_array_equal(result[0], INDICES[rows])


def test_whole_coordinates_are_indices_as_they_are():
    late = jnp.asarray(INDICES)[None] + 5
    assert compute_grid_indices(late, SEGMENTS) is late


def test_queries_may_be_some_of_the_tokens():
    """The queries of two frames meet the keys of all frames, at fractional times."""
    times = jnp.asarray([[0.0, 0.5, 2.0, 2.5]])
    ids = jnp.ones((1, 4), jnp.int32)
    indices = compute_grid_indices(jnp.stack([times, 0 * times, 0 * times], axis=-1), ids)
    seen = mask_boxes(CausalFrames(), AttentionInputs(ids[:, :2], ids, indices[:, ::3], indices))
    np.testing.assert_array_equal(dense_mask(seen)[0], [[True, False, False, False], [True, True, True, True]])
    seen = mask_boxes(SparseCausal(), AttentionInputs(ids[:, :1], ids, indices[:, 3:], indices))
    np.testing.assert_array_equal(dense_mask(seen)[0], [[True, False, True, True]])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CausalFrames(chunk=0), "chunk=0 is invalid: it must be at least 1"),
        (lambda: SlidingWindow(radius=(1, -1, 1)), "must not be negative; use None"),
        (lambda: SlidingWindow(radius=(1, 1, 1), tile=(1, 0, 1)), "tile=0 is invalid: it must be at least 1"),
        (lambda: SlidingWindow(radius=(None, None, None)), "use pattern Full()"),
        (lambda: make_attention("chunked", chunk=0), "chunk=0 is invalid: it must be at least 1"),
        (
            lambda: SplashBlocks(block_q_dkv=100),
            "block_q_dkv=100 of splash attention is invalid; use a multiple of 128",
        ),
        (
            lambda: SplashBlocks(block_kv=512, block_kv_compute=384),
            "block_kv_compute=384 is invalid: it does not divide block_kv=512",
        ),
        (lambda: check_platform("splash", Platform("gpu", (9, 0))), "'splash' is invalid: its kernels are for tpu"),
        (lambda: check_platform(SplashBlocks(), Platform()), "the devices are cpu. Use attention='auto'"),
        (lambda: check_platform("cudnn", Platform("tpu")), "'cudnn' is invalid: its kernels are for gpu"),
        (lambda: make_attention("splash", pattern=SparseCausal()), "splash attention cannot do SparseCausal"),
        (lambda: make_attention("splash", pattern=SlidingWindow(radius=(1, None, None))), "cannot do SlidingWindow"),
        (lambda: make_attention("tokamax", pattern=SparseCausal()), "tokamax attention cannot do SparseCausal"),
        (
            lambda: check_attention("splash", WithGlobalTokens(pattern=SpaceOnly(), globals_see_all=True)),
            "cannot do With",
        ),
        (lambda: check_attention("cudnn", Full(), biased=True), "cudnn attention cannot add a bias"),
        (lambda: inspect.unwrap(make_attention)("flash"), "'flash' is unknown; use auto, dense"),
    ],
)
def test_invalid_patterns_and_backends_are_refused_at_construction(make, message):
    with pytest.raises(UserError) as caught:
        make()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_pattern_of_coordinates_refuses_inputs_without_them():
    array = jnp.zeros((1, 4, 1, 2), jnp.bfloat16)
    ids = jnp.ones((1, 4), jnp.int32)
    for backend in ("dense", "chunked", "splash", "cudnn"):
        with pytest.raises(UserError, match=r"SpaceOnly needs .* give q_indices"):
            make_attention(backend, pattern=SpaceOnly())(array, array, array, AttentionInputs.self_attention(ids))


def test_patterns_are_values_that_a_config_can_hold():
    for pattern, _ in DEFINITIONS:
        written = config_json.to_json(pattern)
        assert written["type"].startswith("dit_video.nn.attention:")
        assert config_json.from_json(written) == pattern
        assert hash(make_attention("chunked", pattern=pattern)) == hash(make_attention("chunked", pattern=pattern))
