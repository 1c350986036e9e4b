"""Animated GIF, PNG and WebP: what is drawn over what, for how long, and over which colour."""

import io
import itertools
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from dit_video.core.errors import DecodeError, UserError
from dit_video.video import decode, probe
from dit_video.video.background import blend, parse_colour
from dit_video.video.reader import Video
from tests.support.animations import AnimationFormat, Disposal, Part, compose, write_animation

FORMATS: tuple[AnimationFormat, ...] = ("gif", "apng", "webp")
HEIGHT, WIDTH = 24, 32
TEAL = (0, 128, 128)


def make_picture(generator, height, width, alpha):
    """Two colours; with a transparent hole, or with an alpha of noise."""
    picture = np.full((height, width, 4), 255, np.uint8)
    picture[..., :3] = generator.integers(0, 256, 3)
    picture[height // 2 :, :, :3] = 255 - picture[0, 0, :3]
    if alpha == "hole":
        picture[height // 4 : height // 2, width // 4 : width // 2, 3] = 0
    elif alpha == "noise":
        picture[..., 3] = generator.integers(0, 256, (height, width))
    return picture


def list_cases():
    alphas, disposals = ("opaque", "hole", "noise"), ("keep", "clear", "restore")
    for format, first, other, disposal, is_blended in itertools.product(
        FORMATS, alphas, alphas, disposals, (True, False)
    ):
        if format == "gif" and (not is_blended or "noise" in (first, other)):
            continue  # pixels of GIF are opaque or transparent, and the latter draw nothing
        if format == "webp" and disposal == "restore":
            continue
        yield format, first, other, disposal, is_blended


@pytest.mark.parametrize(("format", "first", "other", "disposal", "is_blended"), [*list_cases()])
def test_frames_are_those_that_a_viewer_shows(format, first, other, disposal: Disposal, is_blended):
    generator = np.random.default_rng(0)
    parts = [
        Part(make_picture(generator, HEIGHT, WIDTH, first), 0, 0, 100, disposal, is_blended),
        Part(make_picture(generator, 8, 12, other), 4, 6, 50, disposal, is_blended),
        Part(make_picture(generator, 10, 10, other), 8, 10, 200, disposal, is_blended),
        Part(make_picture(generator, 6, 8, other), 10, 12, 150),
    ]
    content = write_animation(format, parts, HEIGHT, WIDTH)
    expected = compose(parts, HEIGHT, WIDTH)
    for background in ((0, 0, 0), TEAL):
        shown = np.stack([blend(frame, background) for frame in expected])
        result = decode(content, background=background).frames
        np.testing.assert_allclose(result.astype(int), shown, atol=4)  # rounded at each of up to four parts
    with Video(content) as video:
        timed = [(round(frame.time, 3), round(frame.duration, 3)) for frame in video.read_frames()]
    assert timed == [(0.0, 0.1), (0.1, 0.05), (0.15, 0.2), (0.35, 0.15)]
    assert probe(content).transparent == bool(expected[..., 3].min() < 255)


def test_the_picture_for_viewers_of_stills_is_no_frame_of_an_apng():
    generator = np.random.default_rng(0)
    hidden, *parts = (Part(make_picture(generator, HEIGHT, WIDTH, "opaque")) for _ in range(4))
    content = write_animation("apng", parts, HEIGHT, WIDTH, hidden=hidden)
    np.testing.assert_array_equal(decode(content).frames, [part.picture[..., :3] for part in parts])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("milliseconds", [(0, 0, 0, 0), (100, 0, 100, 100), (100, 100, 100, 0)])
def test_frames_without_a_duration_are_shown_for_a_tenth_of_a_second(format, milliseconds):
    generator = np.random.default_rng(0)
    parts = [Part(make_picture(generator, HEIGHT, WIDTH, "opaque"), milliseconds=each) for each in milliseconds]
    content = write_animation(format, parts, HEIGHT, WIDTH)
    facts, clip = probe(content), decode(content)
    assert (facts.frames, facts.fps, facts.seconds) == (4, pytest.approx(10), pytest.approx(0.3, abs=1e-4))
    assert clip.fps == pytest.approx(10)
    np.testing.assert_array_equal(clip.frames, [part.picture[..., :3] for part in parts])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("milliseconds", [(10, 10, 10, 10), (40, 80, 40, 80), (1000, 1000, 20, 20)])
def test_a_clip_has_the_rate_of_its_facts(format, milliseconds):
    generator = np.random.default_rng(0)
    parts = [Part(make_picture(generator, HEIGHT, WIDTH, "opaque"), milliseconds=each) for each in milliseconds]
    content = write_animation(format, parts, HEIGHT, WIDTH)
    assert decode(content).fps == pytest.approx(probe(content).fps)
    assert 3 / decode(content).fps == pytest.approx(sum(milliseconds[:3]) / 1000, abs=0.5 / decode(content).fps)


@pytest.mark.parametrize("format", FORMATS)
def test_an_animation_with_a_broken_frame_is_named_as_damaged(format):
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 8, (4, HEIGHT, WIDTH, 4), dtype=np.uint8) * 32
    noise[..., :2], noise[..., 3] = 0, 255  # few colours, and opaque
    content = bytearray(write_animation(format, [Part(picture) for picture in noise], HEIGHT, WIDTH))
    middle = len(content) // 2
    content[middle : middle + 40] = bytes(40)
    with pytest.raises(DecodeError, match="is damaged"):
        decode(bytes(content))


@pytest.mark.parametrize("format", FORMATS)
def test_a_canvas_that_grows_is_refused(format):
    generator = np.random.default_rng(0)
    pictures = [make_picture(generator, *size, "opaque") for size in ((HEIGHT, WIDTH), (HEIGHT + 8, WIDTH + 10))]
    content = write_animation(format, [Part(picture) for picture in pictures], HEIGHT, WIDTH)
    with pytest.raises(DecodeError, match="is damaged"):
        decode(content)


def test_animations_of_pillow_are_read_with_their_times():
    """As ComfyUI writes them, for one."""
    generator = np.random.default_rng(0)
    pictures = [Image.fromarray(generator.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)) for _ in range(3)]
    for suffix, options in {"webp": {"lossless": True}, "png": {}}.items():
        file = io.BytesIO()
        pictures[0].save(file, suffix, save_all=True, append_images=pictures[1:], duration=[80, 120, 40], **options)
        clip = decode(file.getvalue())
        np.testing.assert_array_equal(clip.frames, [np.asarray(picture) for picture in pictures])
        assert clip.fps == pytest.approx(10)


# --- the colour behind transparent pixels -----------------------------------------------------------------------------


def name_background(format, content):
    """Return a file that names teal as its background."""
    if format == "webp":
        start = content.index(b"ANIM") + 8
        return content[:start] + bytes([TEAL[2], TEAL[1], TEAL[0], 255]) + content[start + 4 :]
    if format == "gif":  # the second of two colours for all frames
        return content[:10] + b"\x80\1\0" + bytes([1, 2, 3, *TEAL]) + content[13:]
    chunk = b"bKGD" + struct.pack(">HHH", *TEAL)
    return content[:33] + struct.pack(">I", 6) + chunk + struct.pack(">I", zlib.crc32(chunk)) + content[33:]


@pytest.mark.parametrize("format", FORMATS)
def test_the_own_background_of_a_file(format):
    generator = np.random.default_rng(0)
    parts = [Part(make_picture(generator, HEIGHT, WIDTH, "hole")) for _ in range(2)]
    plain = write_animation(format, parts, HEIGHT, WIDTH)
    frames = compose(parts, HEIGHT, WIDTH)
    for content, background in ((plain, (0, 0, 0)), (name_background(format, plain), TEAL)):
        shown = np.stack([blend(frame, background) for frame in frames])
        np.testing.assert_allclose(decode(content, background="file").frames.astype(int), shown, atol=1)


@pytest.mark.parametrize(("mode", "expected"), [("RGBA", TEAL), ("LA", (100, 100, 100)), ("P", TEAL)])
def test_the_own_background_of_a_png_by_its_kind_of_colours(mode, expected):
    image = Image.new("RGBA", (8, 8))
    chunks = PngImagePlugin.PngInfo()
    if mode == "P":
        image = Image.new("P", (8, 8), 1)
        image.putpalette([*TEAL, 9, 9, 9])
        image.info["transparency"] = 1
        value = b"\0"
    else:
        image, value = image.convert(mode), struct.pack(">HHH", *TEAL) if mode == "RGBA" else struct.pack(">H", 100)
    chunks.add(b"bKGD", value)
    file = io.BytesIO()
    image.save(file, "PNG", pnginfo=chunks)
    assert probe(file.getvalue()).transparent
    assert (decode(file.getvalue(), background="file").frames == expected).all()


def test_what_names_no_background_is_shown_over_black():
    file = io.BytesIO()
    Image.new("RGBA", (8, 8), (200, 100, 50, 0)).save(file, "TIFF")
    assert not decode(file.getvalue(), background="file").frames.any()


@pytest.mark.parametrize(
    ("text", "expected"), [("white", (255, 255, 255)), ("#f2f2f0", (242, 242, 240)), ("#fff", (255,) * 3)]
)
def test_colours_are_written_as_in_css(text, expected):
    assert parse_colour(text) == expected


@pytest.mark.parametrize("text", ["", "whiteish", "#12", "#11223344", "1"])
def test_what_is_no_opaque_colour_is_refused(text):
    with pytest.raises(UserError, match="Use one such as white or #f2f2f2"):
        parse_colour(text)
