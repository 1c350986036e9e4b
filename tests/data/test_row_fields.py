"""Packed rows of cached latents with further fields."""

import contextlib

import numpy as np

from dit_video.core.errors import DecodeError
from dit_video.data.captions import TokenizedCaptions
from dit_video.data.latents.cache import LatentExample, LatentSource
from dit_video.data.latents.writer import write_latents
from dit_video.tokens import Field, Grid, PackedShape, patchify
from support.example_tables import open_latents
from support.fakes import tokenize

PATCH = Grid(1, 2, 2)


def take(source):
    """Return the first batch, of one row."""
    captions, shape = TokenizedCaptions(source.all_captions, tokenize), PackedShape(tokens=24, text=256, segments=4)
    with contextlib.closing(open_latents(source, captions, shape=shape, patch=PATCH)) as rows:
        return next(rows)


def test_rows_hold_the_fields_of_their_clips(tmp_path, monkeypatch):
    draw = np.random.default_rng(3)
    latents = [draw.standard_normal((size, 4, 4, 4)).astype(np.float32) for size in (1, 2, 3)]
    images = [draw.standard_normal((5, 6)).astype(np.float32) for _ in latents]

    def examples():
        for index, (values, image) in enumerate(zip(latents, images, strict=True)):
            fields = {
                "cond_latents": values + 1,
                "image_tokens": image,
                "action": np.arange(len(values), dtype=np.int32),
            }
            yield LatentExample(f"{index}.mp4", "clip", values, fields=fields)

    fields = (
        Field(name="cond_latents", alignment="grid", shape=(4,)),
        Field(name="image_tokens", alignment="sequence", shape=(6,), length=5),
        Field(name="action", alignment="frame", dtype="int32"),
    )
    write_latents(tmp_path / "l", examples(), identity="x", fields=fields, dtype="float32")
    source = LatentSource(tmp_path / "l")
    whole = take(source)
    assert whole.fields["image_tokens"].shape == (1, 4 * 5, 6)
    image_segments = np.asarray(whole.layout.get_sequence_segments(5))
    result = []
    for segment in (1, 2, 3):
        own = whole.segments[0] == segment
        np.testing.assert_array_equal(whole.fields["cond_latents"][0, own], whole.tokens[0, own] + 1)
        np.testing.assert_array_equal(whole.fields["action"][0, own], whole.positions[0, own, 0])
        image = whole.fields["image_tokens"][0, image_segments[0] == segment]
        result += [index for index, one in enumerate(images) if np.array_equal(image, one)]
        np.testing.assert_array_equal(whole.tokens[0, own], patchify(latents[result[-1]], PATCH))
    assert sorted(result) == [0, 1, 2]

    def damaged(self, index):
        raise DecodeError("record 1 is damaged")

    monkeypatch.setattr(LatentSource, "read_example", damaged)
    lost = take(LatentSource(tmp_path / "l"))
    assert not lost.valid.any()
    assert not any(values.any() for values in (lost.tokens, *lost.fields.values()))
    np.testing.assert_array_equal(lost.segments, whole.segments)
