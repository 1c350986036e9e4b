"""Selection of the clips that can be trained on: a bad one is excluded with its reason, too many are an error."""

import numpy as np
import pytest

from dit_video.core.errors import UserError
from dit_video.data.clips import ClipSource
from dit_video.data.sizes import SizeLimits
from dit_video.data.usable_clips import ClipRequirements, select_usable
from dit_video.tokens import Grid
from support.clip_tables import make_row, write_table
from support.fakes import tokenize

MULTIPLE = Grid(4, 16, 16)
LIMITS = SizeLimits(max_pixels=64 * 64, max_frames=9, multiple=MULTIPLE)


def info(name, height=32, width=48, captions=("a",)):
    return make_row(name, height=height, width=width, captions=captions)


@pytest.fixture
def open_clips(tmp_path):
    """Return a function that opens data sets with these clips, one for each list."""

    def open_clips(*datasets):
        for number, infos in enumerate(datasets):
            write_table(tmp_path / str(number), infos)
        return ClipSource({str(number): tmp_path / str(number) for number in range(len(datasets))})

    return open_clips


def test_clips_without_a_size_are_excluded_with_the_reason_and_the_others_keep_their_order(open_clips):
    good = [info(f"{number}.mp4") for number in range(5)]
    clips = open_clips([info("icon.png", 12, 12), *good[:3], info("strip.mp4", 16, 4096)], good[3:])
    selected = select_usable(clips, ClipRequirements(limits=(LIMITS,)))
    assert [one.name for one in selected.clips.infos] == ["0/0.mp4", "0/1.mp4", "0/2.mp4", "1/3.mp4", "1/4.mp4"]
    assert selected.clips.dataset_sizes == (3, 2)
    assert dict(selected.excluded) == {
        "0/icon.png": "12x12 pixels, less than one multiple of 16x16",
        "0/strip.mp4": "16x4096 pixels: no size of at most 4096 pixels in multiples of 16x16 keeps its aspect ratio",
    }
    assert selected.describe().startswith("2 of 7 clips cannot be used: 0/icon.png has 12x12 pixels, less than")


def test_a_clip_must_have_a_size_at_every_resolution(open_clips):
    clips = open_clips([info("wide.mp4", 32, 256), info("square.mp4", 64, 64)])
    large = SizeLimits(max_pixels=16 * 128, max_frames=9, multiple=MULTIPLE)
    small = SizeLimits(max_pixels=16 * 32, max_frames=9, multiple=MULTIPLE)
    assert not select_usable(clips, ClipRequirements(limits=(large,))).excluded
    ((name, reason),) = select_usable(clips, ClipRequirements(limits=(large, small))).excluded
    assert name == "0/wide.mp4"
    assert "at most 512 pixels" in reason


def test_clips_that_a_canvas_has_no_room_for_are_excluded(open_clips):
    clips = open_clips([info("wide.mp4", 16, 64), info("square.mp4", 32, 32)])
    has_room = lambda size: size.w <= 48  # noqa: E731
    ((name, reason),) = select_usable(clips, ClipRequirements(limits=(LIMITS,), has_room=has_room)).excluded
    assert name == "0/wide.mp4"
    assert reason == f"a training size of {Grid(9, 16, 64)}, for which a canvas has no room"


def test_clips_whose_longest_caption_has_no_room_or_is_invalid_are_excluded(open_clips):
    def count_or_refuse(caption):
        if caption == "?":
            raise UserError("the caption '?' is no class")
        return tokenize(caption)

    captions = {"none": (), "short": ("abc", ""), "long": ("a", "abcdef"), "invalid": ("?",)}
    clips = open_clips([info(name, captions=texts) for name, texts in captions.items()])
    room = len(np.asarray(tokenize("abc")))
    selected = select_usable(clips, ClipRequirements(limits=(LIMITS,), tokenize=count_or_refuse, max_text=room))
    assert [one.name for one in selected.clips.infos] == ["0/none", "0/short"]
    assert [name for name, _ in selected.excluded] == ["0/long", "0/invalid"]
    assert selected.excluded[0].reason.endswith(f"text tokens, but a row has room for {room}")
    assert "is no class" in selected.excluded[1].reason


@pytest.mark.parametrize(("count", "share", "is_error"), [(1, 0.01, False), (2, 0.01, True), (1, 0.0, True)])
def test_more_excluded_clips_than_the_share_are_an_error_that_names_the_first(open_clips, count, share, is_error):
    bad = [info(f"bad{number}.png", 8, 8) for number in range(count)]
    selected = select_usable(
        open_clips([*bad, *map(info, map(str, range(100 - count)))]), ClipRequirements(limits=(LIMITS,))
    )
    if not is_error:
        selected.check(share)
        return
    with pytest.raises(
        UserError, match=rf"^{count} of 100 clips .* 0/bad0\.png has 8x8 .* raise data\.max_excluded_share"
    ):
        selected.check(share)


def test_no_usable_clip_at_all_is_an_error_whatever_the_share(open_clips):
    selected = select_usable(
        open_clips([info(f"{number}.png", 8, 8) for number in range(5)]), ClipRequirements(limits=(LIMITS,))
    )
    with pytest.raises(UserError, match=r"5 of 5 clips .*; …\. "):
        selected.check(1.0)
    nothing = ClipRequirements(limits=(LIMITS,), tokenize=tokenize, max_text=9)
    select_usable(open_clips([]), nothing).check(0.0)  # nothing to exclude
