"""Clips as conditioning sees them, and what identifies a conditioning."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest

from dit_video.core.errors import UserError
from dit_video.models.conditioning import ClipConditioning, ClipView, ConditioningLatents, check_conditioning
from dit_video.tokens import Field, Grid

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


class Speed(NamedTuple):
    values: Any


class Course(NamedTuple):
    values: Any


@dataclass(frozen=True, kw_only=True)
class Value(ClipConditioning):
    """A number of a clip, with a name and a record to choose."""

    name: str = "speed"
    record: type = Speed

    @property
    def field(self):
        return Field(name=self.name, alignment="example")

    def from_clip(self, view):
        return np.float32(0)

    def from_request(self, value, latents):
        return np.float32(value)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (Value(record=Course), "name='speed' of the field of Value is invalid: another conditioning has this name"),
        (Value(name="course"), "record=Speed of Value is invalid: another conditioning has this record"),
        (Value(name="course", record=ConditioningLatents), "record=ConditioningLatents .*another input"),
        *(
            (
                Value(name=name, record=Course),
                f"name='{name}' .*another input .*Use {name}_of_clip",
            )
            for name in ("text", "image", "caption", "positions", "embed", "cond_latents", "cond_mask_0")
        ),
    ],
)
def test_a_name_or_a_record_of_another_input_is_refused(second, message):
    check_conditioning((Value(), Value(name="course", record=Course)))
    with pytest.raises(UserError, match=message):
        check_conditioning((Value(), second))
