"""Generators of masks: what they draw, and what they recognise."""

from dataclasses import replace

import numpy as np
import pytest

from dit_video.core.errors import UserError
from dit_video.models.conditioning import (
    Beginning,
    BothEnds,
    Ending,
    FirstAndLastFrame,
    FirstFrame,
    InsideOfBox,
    Keyframes,
    LastFrame,
    OutsideOfBox,
)
from dit_video.tokens import Grid

SIZE = Grid(9, 16, 24)
FRAMES = (FirstFrame(), LastFrame(), FirstAndLastFrame(), Beginning(), Ending(), BothEnds(), Keyframes())
REGIONS = (OutsideOfBox(), InsideOfBox())


def draw(mask, seed, size=SIZE):
    return mask.draw(np.random.default_rng(seed), size)


@pytest.mark.parametrize("mask", [*FRAMES, *REGIONS])
def test_a_generator_accepts_what_it_draws_and_knows_a_part_of_every_clip(mask):
    for seed in range(40):
        generated = draw(mask, seed)
        assert generated.shape == SIZE
        assert 0 < generated.mean() < 1
        assert mask.accepts(generated), seed


@pytest.mark.parametrize("mask", FRAMES)
def test_an_image_has_no_mask_of_frames(mask):
    assert draw(mask, 0, Grid(1, 16, 24)) is None
    assert not mask.accepts(np.zeros((1, 16, 24), bool))


@pytest.mark.parametrize("mask", REGIONS)
def test_an_image_has_masks_of_regions(mask):
    assert mask.accepts(draw(mask, 0, Grid(1, 16, 24)))


def test_generators_of_regions_do_not_accept_each_others_masks_or_those_of_frames():
    outside, inside = draw(OutsideOfBox(), 1), draw(InsideOfBox(), 1)
    assert not OutsideOfBox().accepts(inside)
    assert not InsideOfBox().accepts(outside)
    for mask in REGIONS:
        assert not any(mask.accepts(draw(frames, 3)) for frames in FRAMES)


@pytest.mark.parametrize(
    ("mask", "known", "is_accepted"),
    [
        (FirstFrame(), [0], True),
        (FirstFrame(), [0, 1], False),
        (LastFrame(), [8], True),
        (LastFrame(), [7], False),
        (FirstAndLastFrame(), [0, 8], True),
        (FirstAndLastFrame(), [0, 7], False),
        (Beginning(), [0, 1, 2], True),
        (Beginning(), [0, 2], False),
        (Ending(), [6, 7, 8], True),
        (Ending(), [6, 8], False),
        (BothEnds(), [0, 1, 7, 8], True),
        (BothEnds(), [0, 4, 8], False),
        (BothEnds(), [0, 1], False),
        (Keyframes(), [0, 3, 5], True),
    ],
)
def test_generators_of_frames_recognise_their_frames(mask, known, is_accepted):
    generated = np.ones(SIZE, bool)
    generated[known] = False
    assert mask.accepts(generated) == is_accepted


def test_a_mask_is_true_where_pixels_are_generated():
    np.testing.assert_array_equal(draw(FirstFrame(), 0)[:, 0, 0], np.arange(9) > 0)
    outside, inside = draw(OutsideOfBox(), 1), draw(InsideOfBox(), 1)
    assert not outside[0, 0, 0]  # the border is known, and the box is generated
    assert inside[:, 0].all() or inside[:, -1].all() or inside[:, :, 0].all() or inside[:, :, -1].all()
    assert not inside[:, 8, 12].any()


def test_the_box_of_inpainting_moves():
    boxes = [draw(OutsideOfBox(), seed) for seed in range(20)]
    assert any((box[0] != box[-1]).any() for box in boxes)
    sides = [box[0].any(axis=1).sum() / SIZE.h for box in boxes]
    assert 0.25 <= min(sides) <= max(sides) <= 0.85


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: FirstFrame(weight=0.0), "weight=0.0 is invalid"),
        (lambda: Keyframes(max_distance=1), "max_distance=1 is invalid"),
        (lambda: OutsideOfBox(min_share=0.9), "min_share=0.9, max_share=0.8 is invalid"),
        (lambda: replace(InsideOfBox(), max_share=1.0), "max_share=1.0 is invalid"),
    ],
)
def test_invalid_values_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        change()
