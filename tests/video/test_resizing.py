"""Pictures that ffmpeg resizes during conversion equal `core.resize`, which is the definition."""

import numpy as np
import pytest
from av.video.reformatter import Interpolation

from dit_video.core.resize import resize
from dit_video.tokens import Grid
from dit_video.video import decode, probe
from dit_video.video.to_rgb import RESIZE_FLAGS

SIZES = [(48, 64), (25, 43), (124, 204), (32, 128), (96, 40), (11, 17)]


def plain(height: int, width: int) -> np.ndarray:
    return np.full((1, height, width, 3), (200, 120, 60), np.uint8)


def gradient(height: int, width: int) -> np.ndarray:
    y, x = np.meshgrid(np.linspace(40, 200, height), np.linspace(40, 200, width), indexing="ij")
    return np.stack([x, y, (x + y) / 2], axis=-1)[None].astype(np.uint8)


def checkerboard(height: int, width: int) -> np.ndarray:
    y, x = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    return np.where((x + y) % 2, 200, 50)[None, ..., None].repeat(3, axis=-1).astype(np.uint8)


@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuv444p", "yuv420p10le", "gbrp"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("picture", "tolerance"), [(plain, 0), (gradient, 3), (checkerboard, 10)])
def test_resizing_equals_pixels_resize(write_video, pixel_format, size, picture, tolerance):
    """The triangle filter neither aliases nor shifts.

    Not exactly: swscale filters Y'CbCr before its conversion to RGB, in fixed point (14 bits of weights); at the
    margins its weights are other ones, which shows on the finest checkerboard, there alone: half of `tolerance`.
    """
    codec = "libx264rgb" if pixel_format == "gbrp" else "ffv1"
    if pixel_format == "gbrp":
        content = write_video(picture(96, 128), codec=codec, pixel_format="rgb24", format="mov", options={"qp": "0"})
    else:
        content = write_video(picture(96, 128), pixel_format=pixel_format, colorspace=1, color_range=1)
    expected = resize(decode(content).frames, *size).astype(int)
    difference = np.abs(decode(content, size=Grid(1, *size)).frames - expected)
    assert difference.max() <= tolerance
    assert difference[:, 3:-3, 3:-3].max(initial=0) <= (tolerance + 1) // 2
    if picture is checkerboard and max(size[0] / 96, size[1] / 128) < 0.5:
        assert np.ptp(expected[:, 2:-2, 2:-2]) <= 20  # a larger range would be aliasing


def test_resizing_does_not_shift(write_video):
    """A shift of a tenth of an output pixel would show in the difference along the gradient."""
    frames = gradient(96, 128)
    for pixel_format in ("yuv420p", "yuv444p"):
        content = write_video(frames, pixel_format=pixel_format, colorspace=1, color_range=1)
        for height, width in SIZES:
            small = decode(content, size=Grid(1, height, width)).frames[0].astype(float)
            expected = resize(decode(content).frames, height, width)[0].astype(float)
            step = 160 / width  # change of red from one column of the result to the next
            shift = (small - expected)[2:-2, 2:-2, 0].mean() / step
            assert abs(shift) < 0.1


def test_a_frame_of_60_000_by_2_pixels_is_resized(write_video):
    wide = np.zeros((1, 2, 60_000, 3), np.uint8)
    wide[..., 1] = np.linspace(0, 255, 60_000).astype(np.uint8)
    for options in ({"pixel_format": "bgr0"}, {"pixel_format": "yuv420p", "colorspace": 1, "color_range": 1}):
        content = write_video(wide, **options)
        facts = probe(content)
        assert (facts.height, facts.width) == (2, 60_000)
        whole = decode(content).frames
        small = decode(content, size=Grid(1, 16, 128)).frames
        expected = resize(whole, 16, 128).astype(int)
        assert np.abs(small - expected).max() <= 3


def test_the_resize_filter_has_one_algorithm():
    algorithms = [Interpolation.BICUBIC, Interpolation.AREA, Interpolation.LANCZOS, Interpolation.POINT]
    assert RESIZE_FLAGS & Interpolation.BILINEAR
    assert not any(RESIZE_FLAGS & other for other in algorithms)
