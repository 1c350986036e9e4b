"""Recipes and captions of clips in their files."""

import numpy as np
import pytest

from dit_video.core.errors import DecodeError, MissingError
from dit_video.video import Clip, decode, encode, read_recipe
from dit_video.video.encode import encode_frames
from dit_video.video.reader import Video

RECIPE = {"prompt": 'a "red" cirçle\n', "seed": 3, "size": [5, 16, 16], "sampling": {"steps": 2}, "long": "x" * 70_000}
FRAMES = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)


@pytest.mark.parametrize("suffix", ["mp4", "mov", "webm", "gif", "webp", "apng", "png", "jpg"])
def test_a_file_holds_the_recipe_of_its_clip(tmp_path, suffix):
    frames = FRAMES[:1] if suffix in ("png", "jpg") else FRAMES
    clip, plain = Clip(frames, 8, recipe=RECIPE), Clip(frames, 8)
    clip.save(tmp_path / f"a.{suffix}")
    plain.save(tmp_path / f"b.{suffix}")
    assert read_recipe(tmp_path / f"a.{suffix}") == RECIPE
    assert read_recipe(tmp_path / f"b.{suffix}") == {}
    decoded = [decode(tmp_path / f"{name}.{suffix}").frames for name in "ab"]
    np.testing.assert_array_equal(*decoded)
    assert encode(clip, suffix) == (tmp_path / f"a.{suffix}").read_bytes()


@pytest.mark.parametrize("suffix", ["mp4", "mov", "webm", "gif", "webp", "apng", "png", "jpg"])
@pytest.mark.parametrize(
    ("caption", "recipe"),
    [
        ('a "red" cirçle\n', {}),
        ("", {}),
        ("a dot", {"prompt": "a dot"}),
        ("mine", {"prompt": "a dot"}),
        ("", {"prompt": "a"}),
    ],
)
def test_a_file_holds_the_caption_of_its_clip(tmp_path, suffix, caption, recipe):
    clip = Clip(FRAMES[:1] if suffix in ("png", "jpg") else FRAMES, 8, caption, recipe)
    content = encode(clip, suffix)
    (tmp_path / f"a.{suffix}").write_bytes(content)
    assert decode(content).caption == decode(tmp_path / f"a.{suffix}").caption == caption
    assert read_recipe(tmp_path / f"a.{suffix}") == recipe


@pytest.mark.parametrize(
    "comment",
    ['{"dit_video": 3}', '{"dit_video": {"prompt": 3}}', '{"dit_video": {}, "caption": []}', "[" * 100_000, "no JSON"],
)
def test_a_comment_of_any_kind_keeps_no_clip_from_being_read(tmp_path, comment):
    (tmp_path / "a.png").write_bytes(encode_frames(FRAMES[:1], 8, "png", comment=comment))
    assert decode(tmp_path / "a.png").caption == ""


def test_comments_of_other_programs_are_no_recipes(tmp_path):
    content = encode(Clip(FRAMES[:1], 8, recipe=RECIPE), "png").replace(b'"dit_video"', b'"other_app"')
    (tmp_path / "a.png").write_bytes(content)
    assert read_recipe(tmp_path / "a.png") == {}


@pytest.mark.parametrize("suffix", ["mp4", "webm"])
def test_a_comment_that_is_not_utf8_keeps_no_clip_from_being_read(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(encode(Clip(FRAMES, 8, recipe={"prompt": "a cafe"}), suffix).replace(b"a cafe", b"a caf\xe9"))
    assert decode(path).frames.shape == FRAMES.shape
    assert read_recipe(path) == {"prompt": "a caf\N{REPLACEMENT CHARACTER}"}
    with Video(path) as video:
        assert "\n".join(video.metadata.values()).encode()  # no surrogates


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(MissingError, match="no such file"):
        read_recipe(tmp_path / "a.mp4")
    (tmp_path / "a.mp4").write_bytes(b"nothing")
    with pytest.raises(DecodeError, match="is not a readable video or image"):
        read_recipe(tmp_path / "a.mp4")
