"""Clips as conditioning sees them."""

import numpy as np
import pytest

from dit_video.core.errors import UserError
from dit_video.models.conditioning import ClipView
from dit_video.tokens import Grid

VIEW = ClipView(
    name="a.mp4",
    frames=np.zeros((1, 8, 8, 3), np.uint8),
    fps=8.0,
    frame_stride=3.0,
    latents=Grid(1, 1, 1),
    stride=Grid(4, 8, 8),
)


@pytest.mark.parametrize(("captions", "expected"), [(("first", "second"), "first"), ((), "")])
def test_the_caption_is_the_first_of_the_column_of_captions(captions, expected):
    assert VIEW._replace(columns={"captions": captions}).caption == expected


def test_a_caption_that_no_column_gives_is_refused():
    with pytest.raises(UserError, match=r'lacks "captions".*Name it in `columns`'):
        VIEW.caption  # noqa: B018
