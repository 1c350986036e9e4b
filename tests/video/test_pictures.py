"""Pictures of phones: AVIF and HEIC, in parts or as a whole, and colour profiles."""

import io
import struct
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageCms, TiffImagePlugin

from dit_video.core.errors import DecodeError
from dit_video.video import decode, probe

P3_COLUMNS = {"rXYZ": (0.5151, 0.2412, -0.0011), "gXYZ": (0.2919, 0.6922, 0.0419), "bXYZ": (0.1572, 0.0666, 0.7841)}
"""Primaries of Display P3 in CIE XYZ, adapted to D50, as in Apple's profile."""


def save(picture: np.ndarray, format: str, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format, **options)
    return file.getvalue()


def make_smooth_picture(channels: int) -> np.ndarray:
    y, x = np.mgrid[:48, :64]
    return np.stack([60 + 2 * x, 200 - 2 * y, 40 + x + y, 255 - 3 * x], axis=-1)[..., :channels].astype(np.uint8)


def make_p3_profile() -> bytes:
    """Return the profile of sRGB with the primaries of Display P3, which has the same transfer function and white."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for index in range(struct.unpack_from(">I", profile, 128)[0]):
        tag, offset, _ = struct.unpack_from(">4sII", profile, 132 + 12 * index)
        if (column := P3_COLUMNS.get(tag.decode())) is not None:
            struct.pack_into(">3i", profile, offset + 8, *(round(65536 * value) for value in column))
    return bytes(profile.replace("sRGB".encode("utf-16-be"), "Test".encode("utf-16-be")))


def convert_p3(picture: np.ndarray) -> np.ndarray:
    """Return a picture of Display P3 in sRGB, clipped: both have the transfer function of sRGB."""
    signal = picture / 255
    light = np.where(signal <= 0.04045, signal / 12.92, ((signal + 0.055) / 1.055) ** 2.4)
    matrix = np.array([[1.2249, -0.2247, 0.0], [-0.0420, 1.0419, 0.0], [-0.0197, -0.0786, 1.0979]])
    light = np.clip(light @ matrix.T, 0, 1)
    return np.rint(255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055))


@pytest.mark.parametrize("format", ["PNG", "WEBP", "JPEG", "TIFF", "AVIF"])
def test_display_p3_becomes_srgb(format):
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}, "AVIF": {"quality": 100}}
    picture = make_smooth_picture(3)
    plain = decode(save(picture, format, **options.get(format, {}))).frames[0]
    converted = decode(save(picture, format, icc_profile=make_p3_profile(), **options.get(format, {}))).frames[0]
    assert np.abs(converted - convert_p3(plain)).max() <= 2
    assert np.abs(converted - plain.astype(int)).max() > 10


TAGS = {"XMP": (700, b"<x:xmpmeta/>"), "Photoshop": (34377, b"8BIM"), "GDAL": (42112, "<GDALMetadata/>")}


@pytest.mark.parametrize("tag", TAGS)
def test_a_tiff_has_tags_of_other_programs(tag):
    tags, picture = TiffImagePlugin.ImageFileDirectory_v2(), make_smooth_picture(3)
    tags[TAGS[tag][0]] = TAGS[tag][1]
    np.testing.assert_array_equal(decode(save(picture, "TIFF", tiffinfo=tags)).frames[0], picture)


@pytest.mark.parametrize("options", [{}, {"compression": "tiff_lzw"}, {"compression": "tiff_adobe_deflate"}])
@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA", "CMYK", "1"])
def test_a_tiff_is_read_in_each_of_its_modes(mode, options):
    image = Image.fromarray(make_smooth_picture(3 if mode == "P" else 4)).convert(mode)
    file = io.BytesIO()
    image.save(file, "TIFF", **options)
    rgba = np.asarray(image.convert("RGBA")).astype(int)
    assert np.abs(decode(file.getvalue()).frames[0] - rgba[..., :3] * rgba[..., 3:] / 255).max() <= 1


def test_a_tiff_of_more_bits_is_rounded_or_refused():
    values = np.linspace(0, 65535, 48 * 64).reshape(48, 64)
    result = decode(save(values.astype(np.uint16), "TIFF")).frames[0]
    assert np.abs(result - values[..., None] / 257).max() <= 0.51
    with pytest.raises(DecodeError, match="has pixels of 32 bits; convert it to 8 or 16 bits a colour"):
        decode(save(values.astype(np.float32), "TIFF"))


def test_a_tiff_is_shown_upright():
    picture = make_smooth_picture(3)
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[274] = 6  # turned by a quarter
    np.testing.assert_array_equal(decode(save(picture, "TIFF", tiffinfo=tags)).frames[0], np.rot90(picture, -1))


def save_animation(pictures: np.ndarray, **options) -> bytes:
    """Return an animated WebP without loss, with frames of 100, 200, … ms; parts that do not change are left out."""
    file, images = io.BytesIO(), [Image.fromarray(picture) for picture in pictures]
    durations = [100 * number for number in range(1, len(images) + 1)]
    options = {"save_all": True, "append_images": images[1:], "duration": durations, "lossless": True} | options
    images[0].save(file, "WEBP", **options)
    return file.getvalue()


def test_an_animated_webp_has_its_frames_and_their_times():
    pictures = np.stack([make_smooth_picture(3)] * 3)
    pictures[1, :8, :8], pictures[2, 8:16] = 200, 9
    content = save_animation(pictures)
    np.testing.assert_array_equal(decode(content).frames, pictures)
    info = probe(content)
    assert (info.frames, info.fps, info.seconds, info.codec) == (3, pytest.approx(2 / 0.3), pytest.approx(0.3), "webp")
    sampled = decode(content, start=0.05, fps=10)
    np.testing.assert_array_equal(sampled.frames, pictures[[0, 1, 1, 2, 2, 2]])


def test_a_transparent_animation_is_composited_over_black():
    pictures = np.stack([make_smooth_picture(4), make_smooth_picture(4)[::-1]])
    expected = pictures[..., :3] * (pictures[..., 3:] / 255)
    assert np.abs(decode(save_animation(pictures, exact=True)).frames - expected).max() <= 1


def test_the_profile_of_an_animation_is_applied():
    pictures = np.stack([make_smooth_picture(3), make_smooth_picture(3)[::-1]])
    converted = decode(save_animation(pictures, icc_profile=make_p3_profile())).frames
    assert np.abs(converted - convert_p3(pictures)).max() <= 2


def test_a_damaged_animation_is_refused():
    content = save_animation(np.random.default_rng(0).integers(0, 256, (3, 48, 64, 3)).astype(np.uint8))
    late = bytearray(content)
    late[content.rindex(b"VP8L") + 8] = 0
    for damaged in (content[:25], content[:-300], bytes(late)):
        for read in (probe, decode):
            with pytest.raises(DecodeError, match=r"is not a readable|is damaged"):
                read(damaged)


def test_an_animation_of_impossible_size_is_refused_by_its_header():
    content = bytearray(save_animation(np.stack([make_smooth_picture(3), make_smooth_picture(3)[::-1]])))
    content[24:30] = struct.pack("<I", 9_999)[:3] * 2
    with pytest.raises(DecodeError, match="10000x10000 pixels, over the limit"):
        probe(bytes(content))


def test_frames_of_pictures_with_a_profile_can_be_collected():
    """PyAV 18 frees the name of a profile twice, which ends the process when frames are collected."""
    content = save(make_smooth_picture(3), "PNG", icc_profile=make_p3_profile())
    program = (
        "import gc, sys; from dit_video.video import decode, probe; content = sys.stdin.buffer.read()\n"
        "for _ in range(20):\n"
        "    decode(content); probe(content, on_frame=lambda time, frame: frame.side_data); gc.collect()"
    )
    subprocess.run([sys.executable, "-c", program], input=content, check=True, timeout=100)


def test_other_profiles_change_nothing():
    picture = make_smooth_picture(3)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (srgb, b"damaged" * 40, make_p3_profile()[:200]):
        np.testing.assert_array_equal(decode(save(picture, "PNG", icc_profile=profile)).frames[0], picture)


def test_avif_is_an_image_of_one_frame():
    picture = make_smooth_picture(3)
    content = save(picture, "AVIF", quality=100, subsampling="4:4:4")
    info = probe(content)
    assert (info.height, info.width, info.frames, info.fps, info.codec) == (48, 64, 1, 1.0, "avif")
    assert np.abs(decode(content).frames[0].astype(int) - picture).max() <= 8


def test_transparent_avif_is_composited_over_black():
    """ffmpeg gives colours and transparency as two streams."""
    picture = make_smooth_picture(4)
    content = save(picture, "AVIF", quality=100, subsampling="4:4:4", icc_profile=make_p3_profile())
    assert probe(content).frames == 1
    expected = convert_p3(picture[..., :3]) * (picture[..., 3:] / 255)
    assert np.abs(decode(content).frames[0] - expected).max() <= 10
    assert decode(content, fps=4).frames.shape == (1, 48, 64, 3)


def test_rotated_avif_is_upright():
    for channels in (3, 4):
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by 90 degrees clockwise
        picture = make_smooth_picture(channels)
        picture[..., 3:] = 254
        content = save(picture, "AVIF", quality=100, subsampling="4:4:4", exif=exif)
        frames = decode(content).frames
        assert (probe(content).height, probe(content).width) == (64, 48)
        assert np.abs(frames[0].astype(int) - np.rot90(picture[..., :3], -1)).max() <= 9


def test_damaged_avif_is_refused():
    content = bytearray(save(make_smooth_picture(4), "AVIF"))
    content[-200:] = bytes(200)
    for damaged in (bytes(content), bytes(content[:-300])):
        for read in (probe, decode):
            with pytest.raises(DecodeError, match=r"is not a readable|is damaged"):
                read(damaged)


def test_heic_needs_a_package(monkeypatch):
    """A transparent AVIF by the name of HEIC: of ffmpeg's parts, one would be taken for the picture."""
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    content = save(make_smooth_picture(4), "AVIF").replace(b"ftypavif", b"ftypheic", 1)
    for read in (probe, decode):
        with pytest.raises(DecodeError, match="pip install pillow-heif"):
            read(content)


def test_heic_is_decoded_as_a_whole():
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.register_heif_opener()
    for channels in (3, 4):
        picture = make_smooth_picture(channels)
        picture[..., 3:] = 255
        content = save(picture, "HEIF", quality=100, chroma=444)
        assert (probe(content).codec, probe(content).fps) == ("heic", 1.0)
        assert np.abs(decode(content).frames[0].astype(int) - picture[..., :3]).max() <= 8
