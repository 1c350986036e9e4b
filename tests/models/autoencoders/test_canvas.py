"""Clips on shared canvases: none is lost, none overlap, sizes are few, and latents equal those of each clip alone."""

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_video.core.errors import UserError
from dit_video.models.autoencoders import (
    PatchVaeConfig,
    compute_padding_share,
    compute_segment_ids,
    latent_grid,
    merge_sizes,
    pack_canvases,
)
from dit_video.nn import get_graph_def
from dit_video.tokens import Grid
from support.random_params import make_random_params

STRIDE = Grid(2, 2, 4)
CONFIG = PatchVaeConfig(stride=STRIDE, channels=3, width=8, blocks=2)
GRAPH, PARAMS = get_graph_def(CONFIG.make), make_random_params(CONFIG.make)


@jax.jit
def encode(frames, inside=None):
    return nnx.merge(GRAPH, PARAMS).encode(frames, inside)


def random_sizes(count, seed=0, most=12):
    """Return sizes with odd and even numbers of latents."""
    draw = np.random.default_rng(seed)
    return [
        Grid(1 + 2 * int(t), 2 * int(h), 4 * int(w))
        for t, h, w in zip(draw.integers(0, 5, count), *draw.integers(1, most, (2, count)), strict=True)
    ]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.builds(Grid, st.integers(0, 12).map(lambda t: 1 + 2 * t), *[st.integers(1, 9).map(lambda n: 4 * n)] * 2),
        max_size=60,
    ),
    st.integers(1, 40_000),
    st.integers(1, 9),
)
def test_every_clip_lies_on_one_canvas_apart_from_the_others(sizes, pixels, programs):
    canvases = pack_canvases(sizes, stride=STRIDE, pixels=pixels, max_programs=programs)
    assert sorted(place.clip for canvas in canvases for place in canvas.slots) == list(range(len(sizes)))
    assert len({canvas.size for canvas in canvases}) <= programs
    for canvas in canvases:
        taken = np.zeros((canvas.size.h // STRIDE.h + 1, canvas.size.w // STRIDE.w + 1), int)
        for clip, row, column in canvas.slots:
            _, h, w = latent_grid(sizes[clip], STRIDE)
            assert sizes[clip].t <= canvas.size.t
            assert row % STRIDE.h == column % STRIDE.w == 0
            assert row + sizes[clip].h <= canvas.size.h
            assert column + sizes[clip].w <= canvas.size.w
            top, left = row // STRIDE.h, column // STRIDE.w
            taken[top : top + h + 1, left : left + w + 1] += 1  # with the gap below and beside it
        assert taken.max() == 1
        area = sum(sizes[place.clip].h * sizes[place.clip].w for place in canvas.slots)
        owners = compute_segment_ids(canvas, sizes, STRIDE)
        assert (owners > 0).sum() == area // (STRIDE.h * STRIDE.w)
        for number, (clip, row, column) in enumerate(canvas.slots, 1):
            _, h, w = latent_grid(sizes[clip], STRIDE)
            top, left = row // STRIDE.h, column // STRIDE.w
            assert (owners[top : top + h, left : left + w] == number).all()


@pytest.mark.nightly
def test_latents_on_a_canvas_are_those_of_the_clip_alone():
    sizes = random_sizes(18)
    assert len(set(sizes)) > 15
    draw = np.random.default_rng(1)
    clips = [draw.uniform(-1, 1, (*size, 3)).astype(np.float32) for size in sizes]
    canvases = pack_canvases(sizes, stride=STRIDE, pixels=20_000, max_programs=3)
    assert max(len(canvas.slots) for canvas in canvases) > 5
    compared = 0
    for canvas in canvases:
        # What is on the canvas beside the clips must not matter either.
        frames = draw.uniform(-9, 9, (1, *canvas.size, 3)).astype(np.float32)
        for clip, row, column in canvas.slots:
            t, h, w = sizes[clip]
            frames[0, :t, row : row + h, column : column + w] = clips[clip]
        latents = np.asarray(encode(frames, compute_segment_ids(canvas, sizes, STRIDE)[None]))[0]
        for clip, row, column in canvas.slots:
            t, h, w = latent_grid(sizes[clip], STRIDE)
            top, left = row // STRIDE.h, column // STRIDE.w
            alone = np.asarray(encode(clips[clip][None]))[0]
            np.testing.assert_allclose(latents[:t, top : top + h, left : left + w], alone, atol=1e-5)
            compared += 1
    assert compared == 18
    # Without the mask neighbours would be seen.
    assert np.abs(np.asarray(encode(frames))[0] - latents).max() > 1e-2


def test_lengths_are_rounded_so_that_the_fewest_pixels_are_added():
    # 1 and 3 frames are rare, 9 and 11 frequent: of two lengths, the frequent ones decide.
    sizes = [Grid(1, 2, 4)] + [Grid(3, 2, 4)] + [Grid(9, 2, 4)] * 50 + [Grid(11, 2, 4)] * 50
    lengths = {canvas.size.t for canvas in pack_canvases(sizes, stride=STRIDE, max_programs=2)}
    assert lengths == {9, 11}


def test_padding_is_small_where_sizes_vary():
    draw = np.random.default_rng(0)
    # All of about 256 x 256 pixels, of all shapes from 1:3 to 3:1.
    ratios = np.exp(draw.uniform(-1.1, 1.1, 800))
    sizes = [Grid(17, 16 * round(16 * r**0.5), 16 * round(16 / r**0.5)) for r in ratios.tolist()]
    canvases = pack_canvases(sizes, stride=Grid(4, 8, 8))
    assert len({canvas.size for canvas in canvases}) == 1
    assert compute_padding_share(canvases, sizes) < 0.2
    # Few sizes need none.
    few = [Grid(1, 16, 16), Grid(5, 16, 16), Grid(9, 16, 32)] * 5
    assert compute_padding_share(pack_canvases(few, stride=Grid(4, 8, 8)), few) == 0
    assert compute_padding_share([], []) == 0
    assert pack_canvases([], stride=STRIDE) == []


def test_a_clip_larger_than_a_canvas_gets_a_larger_one():
    sizes = [*random_sizes(40), Grid(9, 200, 400)]
    canvases = pack_canvases(sizes, stride=STRIDE, pixels=1000, max_programs=2)
    assert any(canvas.size.h >= 200 and canvas.size.w >= 400 for canvas in canvases)


@pytest.mark.parametrize("options", [{"max_programs": 0}, {"pixels": 0}])
def test_numbers_below_one_are_refused(options):
    with pytest.raises(UserError, match="at least 1"):
        pack_canvases([Grid(1, 2, 4)], stride=STRIDE, **options)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.builds(Grid, st.integers(1, 9), st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=40),
    programs=st.integers(1, 8),
)
def test_covers_hold_every_clip(sizes, programs):
    result = merge_sizes(sizes, max_programs=programs)
    assert len(result) <= programs
    assert all(any(all(a >= b for a, b in zip(cover, size, strict=True)) for cover in result) for size in sizes)
    assert [cover.volume for cover in result] == sorted(cover.volume for cover in result)
    if len(set(sizes)) <= programs:
        assert set(result) == set(sizes)


def test_similar_sizes_are_merged_into_one_cover():
    result = merge_sizes([Grid(1, 8, 8), Grid(1, 8, 9), Grid(9, 90, 10), Grid(9, 91, 10)], max_programs=2)
    assert result == [Grid(1, 8, 9), Grid(9, 91, 10)]
    with pytest.raises(UserError, match="programs=0"):
        merge_sizes([Grid(1, 1, 1)], max_programs=0)
