"""The task mix: draws of masks by example, and what rows hold of them."""

from collections import Counter

import numpy as np
import pytest

from dit_video.core.errors import UserError
from dit_video.data.packing.mask_mix import MaskMix
from dit_video.models.conditioning import Beginning, FirstFrame, FrameConditioning, InsideOfBox
from dit_video.tokens import Grid

CONDITIONING = FrameConditioning(
    prob=0.75, rest="grey", masks=(FirstFrame(weight=2.0), Beginning(), InsideOfBox(weight=1.0))
)
MIX = MaskMix(CONDITIONING, seed=3, channels=2, stride=Grid(4, 8, 8))


def test_kinds_of_masks_are_drawn_with_their_weights():
    kinds = Counter(CONDITIONING.draw_kind(3, example) for example in range(4000))
    shares = [kinds[kind] / 4000 for kind in (None, 0, 1, 2)]
    np.testing.assert_allclose(shares, [0.25, 0.375, 0.1875, 0.1875], atol=0.03)


def test_a_draw_is_a_function_of_the_seed_and_the_example():
    kinds = [[CONDITIONING.draw_kind(seed, example) for example in range(50)] for seed in (3, 3, 4)]
    assert kinds[0] == kinds[1] != kinds[2]
    size = Grid(9, 32, 32)
    masks = [MIX.draw_known(size, example) for example in range(50)]
    for example, mask in enumerate(masks):
        np.testing.assert_array_equal(mask, MIX.draw_known(size, example))
    assert len({mask.tobytes() for mask in masks}) > 10


def test_rows_hold_the_drawn_kind_in_place_of_all_cached_ones():
    grid = Grid(3, 4, 4)
    fields = {
        field.name: np.full(field.get_shape(grid), kind + 1, np.float32)
        for kind, pair in enumerate(MIX.list_cached_fields())
        for field in pair
    } | {"other": np.ones(3)}
    for example in range(20):
        selected = MIX.select(fields, example)
        assert selected.keys() == {"cond_latents", "cond_mask", "other"}
        kind = CONDITIONING.draw_kind(3, example)
        expected = 0 if kind is None else kind + 1
        assert set(np.unique(selected["cond_latents"])) == {expected}
        assert selected["cond_latents"].shape == (*grid, 2)
        assert selected["cond_mask"].shape == (*grid, 4)


def test_an_image_has_no_known_frames():
    masks = [MIX.draw_known(Grid(1, 32, 32), example) for example in range(40)]
    kinds = [CONDITIONING.draw_kind(3, example) for example in range(40)]
    for kind, mask in zip(kinds, masks, strict=True):
        assert mask.any() == (kind == 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"masks": ()}, "masks is empty"),
        ({"masks": (FirstFrame(), Beginning())}, "rest='zero' is invalid with these masks"),
        ({"prob": 1.5}, "prob=1.5 is invalid"),
    ],
)
def test_invalid_mixes_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        FrameConditioning(**options)


def test_a_model_accepts_the_masks_that_it_is_trained_with():
    first, last, box = (np.ones((9, 16, 16), bool) for _ in range(3))
    first[0], last[-1], box[:, 4:12, 4:12] = False, False, False
    assert CONDITIONING.accepts(first)
    assert CONDITIONING.accepts(box)
    assert not CONDITIONING.accepts(last)
    assert not CONDITIONING.accepts(~box)
    assert FrameConditioning(rest="grey").accepts(first & last)  # Wan's models
    assert not FrameConditioning().accepts(first & last)
