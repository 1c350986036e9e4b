"""Images, videos and masks in every form that a notebook's user has them in."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dit_video.core.errors import MissingError, UserError
from dit_video.sampling.pictures import to_clip, to_image, to_image_or_clip, to_mask
from dit_video.video import Clip

PIXELS = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
FRAMES = np.random.default_rng(1).integers(0, 256, (5, 8, 12, 3), dtype=np.uint8)
OPAQUE = np.concatenate([PIXELS, np.full((8, 12, 1), 255, np.uint8)], axis=-1)


@pytest.mark.parametrize(
    "value",
    [
        Clip(PIXELS[None], 8),
        Image.fromarray(PIXELS),
        Image.fromarray(OPAQUE),
        PIXELS,
        jnp.asarray(PIXELS),
        PIXELS / 255,
        (PIXELS / 255).astype(np.float32),
        jnp.asarray(PIXELS / 255, jnp.float32),
        OPAQUE,
    ],
)
def test_an_image_has_many_forms(value):
    np.testing.assert_array_equal(to_image("image", value).frames, PIXELS[None])


def test_gray_images_have_equal_colours():
    gray = np.repeat(PIXELS[..., :1], 3, axis=-1)[None]
    for value in (PIXELS[..., 0], Image.fromarray(PIXELS[..., 0])):
        np.testing.assert_array_equal(to_image("image", value).frames, gray)


@pytest.mark.parametrize(
    "value",
    [
        Clip(FRAMES, 8),
        FRAMES,
        jnp.asarray(FRAMES),
        FRAMES / 255,
        list(FRAMES),
        tuple(FRAMES / 255),
        [Image.fromarray(frame) for frame in FRAMES],
        [Clip(frame[None], 8) for frame in FRAMES],
    ],
)
def test_a_video_has_many_forms(value):
    np.testing.assert_array_equal(to_clip("video", value).frames, FRAMES)
    np.testing.assert_array_equal(to_image_or_clip("content", value).frames, FRAMES)


def test_files_are_named_by_strings_and_paths(tmp_path):
    Clip(PIXELS[None], 1).save(tmp_path / "image.png")
    Clip(FRAMES, 8, "a dot").save(tmp_path / "clip.apng")
    np.testing.assert_array_equal(to_image("image", str(tmp_path / "image.png")).frames, PIXELS[None])
    np.testing.assert_array_equal(to_image("image", tmp_path / "clip.apng").frames, FRAMES[:1])
    np.testing.assert_array_equal(to_clip("video", tmp_path / "clip.apng").frames, FRAMES)
    captions = [convert("content", tmp_path / "clip.apng").caption for convert in (to_image, to_clip, to_image_or_clip)]
    assert captions == ["a dot"] * 3
    with pytest.raises(MissingError, match=r"photo\.png"):
        to_image("image", "photo.png")


@pytest.mark.parametrize("mask", [FRAMES[..., 0] > 127, PIXELS[..., 0] > 127, np.arange(5) > 2])
def test_a_mask_is_boolean_or_white_where_it_is_true(mask, tmp_path):
    np.testing.assert_array_equal(to_mask("generated", jnp.asarray(mask)), mask)
    if mask.ndim == 1:
        return
    white = np.where(mask, 255, 0).astype(np.uint8)
    pixels = white[..., None].repeat(3, -1)
    Clip(pixels if mask.ndim == 3 else pixels[None], 1).save(tmp_path / "mask.apng")
    np.testing.assert_array_equal(to_mask("generated", str(tmp_path / "mask.apng")), mask)
    if mask.ndim == 2:
        np.testing.assert_array_equal(to_mask("generated", Image.fromarray(white)), mask)


def test_a_picture_of_a_mask_whose_labels_are_below_white_is_refused(tmp_path):
    pixels = np.repeat(PIXELS[..., :1] % 3, 3, axis=-1)
    Clip(pixels[None], 1).save(tmp_path / "mask.png")
    for value in (Image.fromarray(pixels), tmp_path / "mask.png"):
        with pytest.raises(UserError, match=r"x is invalid: .* brightest pixel is 2\. Use .* pixels > 0"):
            to_mask("x", value)
    assert not to_mask("x", Image.new("L", (4, 4))).any()


TRANSPARENT = OPAQUE.copy()
TRANSPARENT[0, 0, 3] = 0


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("convert", "value", "message"),
    [
        (to_image, Clip(FRAMES, 8), r"a clip of 5 frames is no image\. Use Clip"),
        (
            to_image,
            PIXELS.astype(int),
            r"of int64 \[8, 12, 3\] is invalid: .* from 0 to 255\. Use pixels / 255 if white",
        ),
        (to_image, PIXELS / 127.5 - 1, r"floats from 0 to 1, these from -1 to 1\. Use .*pixels, 0, 1\) if it is 0"),
        (to_image, PIXELS / 250, r"Use np\.clip\(pixels, 0, 1\) if white is 1, pixels / 255 if it is 255"),
        (to_image, PIXELS * 1.0 - 99, r"these from -99 to 156\. Use np\.clip\(\(pixels - black\)"),
        (to_image, np.full((2, 2, 3), np.nan), "floats from 0 to 1, these from nan to nan. Use finite values"),
        (to_image, PIXELS.astype("U3"), "of <U3 is invalid: pixels are numbers. Use uint8, or floats from 0 to 1"),
        (to_image, FRAMES, r"an image is \[H W 3\]\. Use pixels\[0\], one frame"),
        (to_image, FRAMES[None], r"an image is \[H W 3\]\. Use pixels \[H W 3\]"),
        (to_image, TRANSPARENT, r"transparent\. Use image\.convert\('RGB'\)"),
        (to_image, Image.fromarray(TRANSPARENT), r"transparent\. Use image\.convert\('RGB'\)"),
        (
            to_image,
            Image.fromarray(np.zeros((2, 2), np.int32)),
            r"of mode I is invalid: .* Use np\.asarray\(image\) / white",
        ),
        (to_image, [PIXELS], "a list is no picture. Use a clip, an array"),
        (to_image, 3, "a int is no picture"),
        (to_clip, PIXELS, r"a video is \[T H W 3\]\. Use x\[None\]"),
        (to_clip, FRAMES[None], r"of shape \[1, 5, 8, 12, 3\] .* Use x\[0\]"),
        (to_clip, FRAMES[..., 0], r"of shape \[5, 8, 12\] .* Use np\.repeat\(x\[\.\.\., None\], 3, axis=-1\)"),
        (to_clip, Image.fromarray(PIXELS), r"an image is no video\. Use \[image\]"),
        (to_clip, [PIXELS, PIXELS[:4]], "sizes 4x12, 8x12. Use frames of one size"),
        (to_clip, [PIXELS, 3], "a int is no picture"),
        (to_clip, [], "a list is no picture"),
        (to_mask, Image.fromarray(TRANSPARENT), "parts of it are transparent"),
        (
            to_mask,
            FRAMES[..., 0],
            r"x of uint8 \[5, 8, 12\] .* must be boolean, .* Use x > 127 if white is 255, x > 0\.5",
        ),
        (to_mask, FRAMES > 127, r"x of bool \[5, 8, 12, 3\] is invalid: .* Use x\[\.\.\., 0\]"),
        (to_mask, True, "x of bool .* Use an array or a picture"),
    ],
)
def test_what_is_no_picture_or_could_be_two_is_refused(convert, value, message):
    with pytest.raises(UserError, match=message) as error:
        convert("x", value)
    assert str(error.value).startswith("x ")


GRAY = PIXELS[..., :1].repeat(3, -1)
BINARY = np.where(GRAY > 127, 255, 0).astype(np.uint8)


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (BINARY[..., 0] > 0, BINARY),
        (BINARY > 0, BINARY),
        (BINARY // 255 * np.int64(1), BINARY),
        (PIXELS.astype(int), PIXELS),
        (PIXELS[..., 0].astype(int), GRAY),
        (PIXELS.astype(np.uint16) * 257, PIXELS),
        (PIXELS.astype(np.float32), PIXELS),
        (PIXELS / 127.5 - 1, PIXELS),
        (PIXELS[..., 0] / 127.5 - 1, GRAY),
        (PIXELS[..., :1], GRAY),
        (PIXELS[:, :2, 0], GRAY[:, :2]),
        (PIXELS[..., 0][None], GRAY),
        (PIXELS.transpose(2, 0, 1), PIXELS),
        (OPAQUE.transpose(2, 0, 1), PIXELS),
        (PIXELS.transpose(2, 0, 1) / 127.5 - 1, PIXELS),
        (PIXELS[None], PIXELS),
        (FRAMES[..., :1], FRAMES[..., :1].repeat(3, -1)),
        (FRAMES[..., 0], FRAMES[..., :1].repeat(3, -1)),
        (FRAMES.transpose(3, 0, 1, 2), FRAMES),
        (FRAMES.transpose(0, 3, 1, 2), FRAMES),
        (FRAMES.transpose(0, 3, 1, 2).astype(int), FRAMES),
        (FRAMES[None], FRAMES),
    ],
    ids=lambda each: f"{each.dtype}{list(each.shape)}",
)
def test_the_advice_of_an_error_makes_the_picture_that_was_meant(value, expected):
    convert = to_image if expected.ndim == 3 else to_clip
    for _ in range(2):
        with pytest.raises(UserError) as error:
            convert("pixels", value)
        advice = re.search(r"Use (.+?)( if |, one frame|, such as|$)", str(error.value))
        value = eval(advice[1], {"pixels": value, "np": np, "white": 65535})
        try:
            made = convert("pixels", value).frames
        except UserError:
            continue
        break
    np.testing.assert_array_equal(made, expected.reshape(made.shape))
