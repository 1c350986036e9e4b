"""Decoded pictures equal those of ffmpeg's filters scale, transpose, bwdif and premultiply."""

import io
import math
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from av.filter import Graph

from dit_video.core.errors import DecodeError
from dit_video.core.resize import resize
from dit_video.tokens import Grid
from dit_video.video import decode, probe
from dit_video.video.background import blend

FLAGS = "accurate_rnd+full_chroma_int+full_chroma_inp+bitexact"
MATRICES = {"bt601": 6, "bt709": 1, "bt2020": 9}
RANGES = {"tv": 1, "pc": 2}


def decode_stored(content: bytes) -> list[av.VideoFrame]:
    with av.open(io.BytesIO(content)) as container:
        return list(container.decode(video=0))


def apply_filters(frames: list[av.VideoFrame], *filters: tuple[str, str]) -> np.ndarray:
    """Send frames through filters of ffmpeg and return them as RGB."""
    first, graph = frames[0], Graph()
    graph.threads = 1
    source = graph.add(
        "buffer",
        f"video_size={first.width}x{first.height}:pix_fmt={first.format.name}:time_base={first.time_base}"
        f":pixel_aspect=1/1:colorspace={int(first.colorspace)}:range={int(first.color_range)}",
    )
    last = [("format", "pix_fmts=rgb24"), ("buffersink", None)]
    graph.link_nodes(source, *(graph.add(*part) for part in [*filters, *last])).configure()
    for frame in [*frames, None]:
        graph.push(frame)
    return np.stack([graph.pull().to_ndarray() for _ in frames])


def scale(matrix: str, range_: str, *, size: str = "", algorithm: str = "bicubic", chroma: str = "") -> tuple[str, str]:
    chroma = f":in_chroma_loc={chroma}" if chroma else ""
    return "scale", (f"in_color_matrix={matrix}:in_range={range_}:out_range=pc:flags={algorithm}+{FLAGS}{size}{chroma}")


def measure_difference(content: bytes, *filters: tuple[str, str]) -> int:
    """Return the largest difference from the pictures of ffmpeg, of 255."""
    expected = apply_filters(decode_stored(content), *filters).astype(int)
    result = decode(content).frames
    assert result.shape == expected.shape
    return int(np.abs(result - expected).max())


@pytest.mark.parametrize("range_", RANGES)
@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuv422p", "yuv444p", "yuv420p10le", "yuv422p10le", "yuv444p12le"])
def test_every_matrix_range_and_depth_converts_as_in_ffmpeg(write_video, textured, pixel_format, matrix, range_):
    """Both sides are the bit-exact arithmetic of swscale, with the same matrix, range and filter."""
    content = write_video(
        textured(2, 34, 48), pixel_format=pixel_format, colorspace=MATRICES[matrix], color_range=RANGES[range_]
    )
    assert measure_difference(content, scale(matrix, range_)) == 0
    others = [(m, r) for m in MATRICES for r in RANGES if (m, r) != (matrix, range_)]
    assert all(measure_difference(content, scale(*other)) > 1 for other in others)  # the comparison would notice


@pytest.mark.parametrize(
    ("codec", "format", "pixel_format", "range_", "chroma"),
    [
        ("libx264", "mp4", "yuv420p", "tv", "left"),
        ("libx264", "mov", "yuv420p10le", "tv", "left"),
        ("mpeg4", "avi", "yuv420p", "tv", "left"),
        ("mjpeg", "avi", "yuvj420p", "pc", "center"),
        ("rawvideo", "avi", "yuyv422", "tv", ""),
        ("v210", "mov", "yuv422p10le", "tv", ""),
        ("prores_ks", "mov", "yuv422p10le", "tv", ""),
        ("libvpx-vp9", "webm", "yuv420p", "tv", ""),
        ("ffv1", "matroska", "bgr0", "pc", ""),
        ("ffv1", "matroska", "gbrp10le", "pc", ""),
        ("ffv1", "matroska", "gray", "pc", ""),
        ("ffv1", "matroska", "gray10le", "pc", ""),
    ],
)
def test_every_codec_converts_as_in_ffmpeg(write_video, textured, codec, format, pixel_format, range_, chroma):
    """Values are equal: the filter of ffmpeg gets the chroma location of the decoder, which it ignores otherwise."""
    frames = textured(2, 34, 48, channels=1 if "gray" in pixel_format else 3)
    content = write_video(frames, codec=codec, format=format, pixel_format=pixel_format)
    assert measure_difference(content, scale("bt601", range_, chroma=chroma)) == 0


@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuv420p10le", "yuv422p", "yuv410p"])
@pytest.mark.parametrize(("height", "width"), [(33, 47), (33, 48), (34, 47), (13, 11), (1, 1)])
def test_odd_sizes_convert_as_in_ffmpeg(write_video, textured, pixel_format, height, width):
    content = write_video(textured(2, height, width), pixel_format=pixel_format, colorspace=1, color_range=1)
    assert measure_difference(content, scale("bt709", "tv")) == 0


def test_ten_bits_in_two_planes_convert_as_in_ffmpeg():
    """Only hardware decoders give p010, so the frame is made and converted without a file."""
    from dit_video.video.to_rgb import RgbConverter

    rng = np.random.default_rng(0)
    planar = av.VideoFrame(32, 16, "yuv420p10le")
    for plane in planar.planes:
        values = rng.integers(64, 941, plane.buffer_size // 2).astype("<u2")
        plane.update(values.tobytes())
    planar.colorspace, planar.color_range, planar.pts, planar.time_base = 1, 1, 0, Fraction(1, 10)
    packed = planar.reformat(format="p010le")
    expected = apply_filters([packed], scale("bt709", "tv"))[0]
    np.testing.assert_array_equal(RgbConverter("a clip", Fraction(1), None)(packed, 0.0), expected)


def test_high_definition_is_bt709_where_nothing_is_said(write_video, textured):
    for height, width, matrix in [(576, 720, "bt601"), (480, 854, "bt601"), (544, 1280, "bt709"), (580, 720, "bt709")]:
        content = write_video(textured(1, height, width), pixel_format="yuv420p")
        assert measure_difference(content, scale(matrix, "tv")) == 0


def test_limited_gray_is_shown_as_luma_alone(write_video, textured):
    """swscale takes all gray for full range, and we show limited gray like luma in colour."""
    frames = textured(1, 34, 48, channels=1)
    for pixel_format, colour, levels in [("gray", "yuv444p", 1), ("gray10le", "yuv444p10le", 4)]:
        content = write_video(frames, pixel_format=pixel_format, color_range=1)
        (gray,) = decode_stored(content)
        frame = av.VideoFrame(48, 34, colour)
        frame.pts, frame.time_base, frame.color_range, frame.colorspace = 0, Fraction(1, 10), 1, 6
        values = [gray.to_ndarray(), np.full((34, 48), 128 * levels), np.full((34, 48), 128 * levels)]
        for plane, value in zip(frame.planes, values, strict=True):
            item = 1 if levels == 1 else 2
            rows = np.zeros((34, plane.line_size // item), f"<u{item}")
            rows[:, :48] = value
            plane.update(rows.tobytes())
        expected = apply_filters([frame], scale("bt601", "tv"))
        result = decode(content).frames
        assert np.abs(result.astype(int) - expected).max() <= 1  # rounding at 16 bits
        assert result.min() < gray.to_ndarray().min() / levels - 10


def test_colour_matrices_that_ffmpeg_cannot_convert_are_refused(write_video, textured):
    for matrix in (8, 10, 14, 15, 16, 17):  # YCgCo, constant-luminance BT.2020, ICtCp, IPT-C2, YCgCo-Re and -Ro
        content = write_video(textured(1, 32, 32), pixel_format="yuv444p", colorspace=matrix)
        for read in (probe, decode):
            with pytest.raises(DecodeError, match=r"convert the file to BT\.709"):
                read(content)


@pytest.mark.parametrize(
    ("codec", "format", "pixel_format"),
    [("png", "mov", "rgba"), ("png", "mov", "rgba64be"), ("ffv1", "matroska", "yuva420p"), ("qtrle", "mov", "argb")],
)
def test_transparency_is_composited_over_black(write_video, textured, codec, format, pixel_format):
    """Results are within one of ffmpeg's premultiply, which rounds by itself, or two if 16 bits are cut to 8."""
    frames = textured(2, 34, 48, channels=4)
    frames[:, :8, :, 3], frames[:, 8:16, :, 3] = 0, 255
    content = write_video(frames, codec=codec, format=format, pixel_format=pixel_format, color_range=0)
    rgba = [
        frame.reformat(format="gbrap", src_color_range=1 if "yuv" in pixel_format else 2, dst_color_range=2)
        for frame in decode_stored(content)
    ]
    for frame in rgba:
        frame.colorspace, frame.color_range = 0, 2
    expected = apply_filters(rgba, ("premultiply", "inplace=1"), ("format", "pix_fmts=gbrp")).astype(int)
    result = decode(content).frames
    assert (result[:, :8] == 0).all()
    close = np.abs(result - expected)
    assert close.max() <= (12 if "yuv" in pixel_format else 2)  # that reference interpolates chroma less well
    assert close.mean() < 1.0


def test_colours_are_multiplied_with_alpha_as_in_ffmpeg():
    """All 65,536 pairs are rounded to nearest, as by ffmpeg over a black picture."""
    colour, alpha = np.meshgrid(np.arange(256), np.arange(256), indexing="ij")
    image = np.stack([colour, colour, colour, alpha], axis=-1).astype(np.uint8)
    result = blend(image)
    np.testing.assert_array_equal(result[..., 1], np.rint(colour * alpha / 255))
    graph = av.filter.Graph()
    source = graph.add("buffer", "video_size=256x256:pix_fmt=rgba:time_base=1/1:pixel_aspect=1/1")
    black = graph.add("color", "c=black:s=256x256:r=1:d=1")
    rgb, overlay, sink = graph.add("format", "rgb24"), graph.add("overlay", "format=rgb"), graph.add("buffersink")
    black.link_to(rgb)
    rgb.link_to(overlay, 0, 0)
    source.link_to(overlay, 0, 1)
    overlay.link_to(sink)
    graph.configure()
    frame = av.VideoFrame.from_ndarray(image, format="rgba")
    frame.pts, frame.time_base = 0, Fraction(1)
    source.push(frame)
    source.push(None)
    np.testing.assert_array_equal(sink.pull().to_ndarray(format="rgb24"), result)


def test_transparent_vp9_is_composited_over_black(write_video, textured):
    """The decoder of libvpx reads transparency, unlike ffmpeg's own one."""
    frames = textured(3, 32, 48, channels=4)
    frames[..., 3] = 255
    frames[:, :, :24, 3] = 0
    content = write_video(frames, codec="libvpx-vp9", format="webm", pixel_format="yuva420p")
    result = decode(content).frames
    assert result[:, :, :20].max() <= 2
    assert result[:, :, 28:].mean() > 80
    assert probe(content).codec == "vp9"


def test_palettes_are_converted(write_video, textured):
    frames = textured(3, 33, 47)
    content = write_video(frames, codec="gif", format="gif", pixel_format="rgb8")
    np.testing.assert_array_equal(decode(content).frames, apply_filters(decode_stored(content)))
    assert np.abs(decode(content).frames.astype(int) - frames).mean() < 32  # red and green have eight levels, blue four


# --- shape of pixels, and which way is up ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("aspect", "width"),
    [((4, 3), 64), ((2, 3), 32), ((16, 11), 70), ((1, 1), 48), ((40, 33), 58), ((1, 24), 2)],
)
def test_pixels_that_are_not_square_are_resized_to_squares(write_video, textured, aspect, width):
    frames = textured(2, 36, 48)
    content = write_video(
        frames,
        pixel_format="yuv444p",
        format="mov",
        codec="libx264",
        options={"qp": "0"},
        sample_aspect_ratio=Fraction(*aspect),
    )
    facts = probe(content)
    assert (facts.height, facts.width) == (36, width)
    if width == 48:
        assert measure_difference(content, scale("bt601", "tv")) == 0
    else:
        assert measure_difference(content, scale("bt601", "tv", size=f":w={width}:h=36", algorithm="bilinear")) == 0


@pytest.mark.parametrize(
    ("codec", "aspects"),
    [
        ("mpeg2video", (Fraction(16, 11), Fraction(12, 11))),
        ("libx264", (Fraction(16, 11), Fraction(12, 11))),
        ("libx264", (None, Fraction(12, 11))),
        ("libx264", (Fraction(12, 11), None)),
    ],
)
def test_a_pixel_aspect_that_changes_is_refused(write_video, textured, codec, aspects):
    """A recording of television has another aspect from the second part on, or tells none, and no other size."""
    frames = textured(24, 96, 160)
    how = {"codec": codec, "format": "mpegts", "pixel_format": "yuv420p", "rate": 24}
    parts = [
        write_video(frames, **how, first=24 * second, **({} if aspect is None else {"sample_aspect_ratio": aspect}))
        for second, aspect in enumerate(aspects)
    ]
    shown = round(160 * (aspects[0] or 1)) if codec == "libx264" else 212
    assert decode(parts[0]).frames.shape == (24, 96, shown, 3)
    for read in (decode, probe, lambda file: decode(file, start=0.5)):
        with pytest.raises(
            DecodeError, match=r"changes its pixel aspect from .* at 0\.[89]\d s, .*; cut the file there"
        ):
            read(parts[0] + parts[1])
    if None not in aspects:
        with pytest.raises(DecodeError, match="changes its pixel aspect"):
            decode(parts[0] + parts[1], start=1.4, frames=2)


def test_anamorphic_rgb_is_resized_to_square_pixels(write_video, textured):
    frames = textured(1, 36, 48)
    content = write_video(frames, codec="png", pixel_format="rgb24", format="mov", sample_aspect_ratio=Fraction(4, 3))
    np.testing.assert_array_equal(decode(content).frames, resize(frames, 36, 64))


@pytest.fixture(scope="module")
def mov(write_video, textured):
    return write_video(textured(3, 48, 64), codec="png", pixel_format="rgb24", format="mov")


@pytest.mark.parametrize(
    ("offsets", "top", "left"), [((0, 1, 0, 1), 12, 9), ((5, 1, -3, 1), 9, 14), ((-13, 3, 5, 4), 13, 5)]
)
@pytest.mark.parametrize("turned", [False, True])
def test_the_clean_aperture_of_mp4_is_shown(mov, add_aperture, offsets, top, left, turned):
    """It is placed by the distance of its centre from the picture's (ISO/IEC 14496-12, 12.1.4), and then turned."""
    expected = decode(mov).frames[:, top : top + 24, left : left + 46]
    cropped = add_aperture(mov, 46, 1, 96, 4, *offsets)
    if turned:
        matrix = cropped.index(b"tkhd") + 44
        numbers = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
        cropped, expected = cropped[:matrix] + numbers + cropped[matrix + 36 :], np.rot90(expected, -1, (1, 2))
    np.testing.assert_array_equal(decode(cropped).frames, expected)
    assert (probe(cropped).height, probe(cropped).width) == expected.shape[1:3]
    assert decode(cropped, size=Grid(1, 8, 12)).frames.shape == (1, 8, 12, 3)


@pytest.mark.parametrize(
    "numbers",
    [(46, 0, 25, 1, 0, 1, 0, 1), (80, 1, 25, 1, 0, 1, 0, 1), (46, 1, 25, 1, 99, 1, 0, 1), (0, 1) * 4],
    ids=["division by zero", "wider than the picture", "beside the picture", "empty"],
)
def test_an_aperture_that_cannot_be_is_ignored(mov, add_aperture, numbers):
    np.testing.assert_array_equal(decode(add_aperture(mov, *numbers)).frames, decode(mov).frames)


@pytest.mark.parametrize(
    ("ids", "shown"),
    [(("54CC", "54BB"), np.s_[:, 3:, 5:]), (("54DD", "54AA"), np.s_[:, :-3, :-5])],
    ids=["left and top", "right and bottom"],
)
def test_matroska_crops_pictures(write_video, textured, ids, shown):
    """The 15 bytes of two elements after a track's video become elements of it: PixelCropLeft and others (RFC 9559)."""
    content = write_video(textured(3, 48, 64))
    start = content.index(b"\xe0\x8a\xb0\x81\x40\xba\x81\x30")  # a video of 10 bytes: its width, its height
    assert content[start + 12 : start + 27] == b"\x55\xee\x81\0" + b"\xec\x01" + bytes(6) + b"\x02" + bytes(2)
    crop = b"".join(bytes.fromhex(kind) + b"\x81" + bytes([count]) for kind, count in zip(ids, (5, 3), strict=True))
    video = content[start + 2 : start + 12] + crop + b"\xec\x85" + bytes(5)
    cropped = content[:start] + b"\xe0\x99" + video + content[start + 27 :]
    np.testing.assert_array_equal(decode(cropped).frames, decode(content).frames[shown])


TURNS = {
    90: ("transpose", "dir=cclock"),  # the direction of set_display_rotation
    180: ("hflip", ""),
    270: ("transpose", "dir=clock"),
}


@pytest.mark.parametrize("degrees", TURNS)
@pytest.mark.parametrize("aspect", [Fraction(1), Fraction(4, 3)])
def test_turned_pictures_are_shown_upright(write_video, textured, degrees, aspect):
    content = write_turned(write_video, textured(2, 36, 48), degrees, aspect)
    width = round(48 * aspect)
    facts = probe(content)
    assert (facts.height, facts.width) == ((36, width) if degrees == 180 else (width, 36))
    same = scale("bt601", "tv")
    resized = scale("bt601", "tv", size=f":w={width}:h=36", algorithm="bilinear")
    turn = [TURNS[degrees], ("vflip", "")] if degrees == 180 else [TURNS[degrees]]
    assert measure_difference(content, same if aspect == 1 else resized, ("format", "pix_fmts=gbrp"), *turn) == 0


def write_turned(write_video, frames, degrees, aspect=Fraction(1), flip=False):
    buffer = io.BytesIO(
        write_video(
            frames,
            pixel_format="yuv444p",
            codec="libx264",
            format="mov",
            options={"qp": "0"},
            sample_aspect_ratio=aspect,
        )
    )
    out = io.BytesIO()
    with av.open(buffer) as source, av.open(out, "w", format="mov") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        stream.set_display_rotation(degrees, hflip=flip)
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    return out.getvalue()


@pytest.mark.parametrize("degrees", [30, 45, 240, 0.5, 90.5])
def test_a_picture_that_is_turned_by_no_right_angle_is_refused(write_video, textured, degrees):
    """It would have empty corners. Less than a degree is rounding."""
    content = bytearray(write_turned(write_video, textured(2, 36, 48), 90))
    start = content.index(b"tkhd") + 44
    cosine, sine = (round(65536 * function(math.radians(degrees))) for function in (math.cos, math.sin))
    content[start : start + 20] = struct.pack(">5i", cosine, sine, 0, -sine, cosine)
    for read in (probe, decode):
        if degrees % 90 < 1:
            assert read(bytes(content)) == read(write_turned(write_video, textured(2, 36, 48), -round(degrees)))
        else:
            with pytest.raises(DecodeError, match=rf"turned by {degrees} degrees.* encode it upright"):
                read(bytes(content))


def test_a_mirrored_picture_is_flipped(write_video, textured):
    content = write_turned(write_video, textured(2, 36, 48), 0, flip=True)
    assert measure_difference(content, scale("bt601", "tv"), ("format", "pix_fmts=gbrp"), ("hflip", "")) == 0


def test_turned_pictures_are_resized_before_they_are_turned(write_video, textured):
    content = write_turned(write_video, textured(2, 36, 48), 90)
    resized = scale("bt601", "tv", size=":w=20:h=12", algorithm="bilinear")
    expected = apply_filters(decode_stored(content), resized, ("format", "pix_fmts=gbrp"), TURNS[90])
    np.testing.assert_array_equal(decode(content, size=Grid(2, 20, 12)).frames, expected)


EXIF = {
    1: lambda picture: picture,
    2: lambda picture: picture[:, ::-1],
    3: lambda picture: picture[::-1, ::-1],
    4: lambda picture: picture[::-1],
    5: lambda picture: picture.swapaxes(0, 1),
    6: lambda picture: np.rot90(picture, -1),
    7: lambda picture: picture[::-1, ::-1].swapaxes(0, 1),
    8: lambda picture: np.rot90(picture, 1),
}


@pytest.mark.parametrize("orientation", EXIF)
def test_photos_are_turned_by_their_exif_orientation(textured, orientation):
    plain = single("mjpeg", "yuvj444p", textured(1, 24, 40)[0])
    entry = struct.pack("<HHIHH", 0x0112, 3, 1, orientation, 0)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + entry + bytes(4)
    photo = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + plain[2:]
    expected = EXIF[orientation](decode(plain).frames[0])
    np.testing.assert_array_equal(decode(photo).frames[0], expected)
    facts = probe(photo)
    assert (facts.height, facts.width) == expected.shape[:2]


def single(codec: str, pixel_format: str, picture: np.ndarray) -> bytes:
    """Return an image file."""
    context = av.CodecContext.create(codec, "w")
    context.height, context.width, context.pix_fmt, context.time_base = *picture.shape[:2], pixel_format, Fraction(1)
    frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pixel_format)
    frame.pts = 0
    return b"".join(bytes(packet) for packet in [*context.encode(frame), *context.encode(None)])


# --- interlaced -----------------------------------------------------------------------------------------------------


def interlace(textured, count: int) -> np.ndarray:
    """Return frames whose odd lines are half a frame later: a texture that moves by two pixels a field."""
    fields = textured(4 * count, 32, 64)[::2]
    frames = fields[0::2].copy()
    frames[:, 1::2] = fields[1::2][:, 1::2]
    return frames


INTERLACED = {"codec": "libx264", "format": "mp4", "pixel_format": "yuv420p"}
FIELDS = {"flags": "+ilme+ildct", "qp": "0", "x264-params": "tff=1"}


def test_interlaced_frames_are_deinterlaced(write_video, textured):
    content = write_video(interlace(textured, 6), **INTERLACED, options=FIELDS)
    assert all(frame.interlaced_frame for frame in decode_stored(content))
    bwdif = ("bwdif", "mode=send_frame:parity=auto:deint=interlaced")
    assert measure_difference(content, bwdif, scale("bt601", "tv", chroma="left")) == 0
    assert probe(content).frames == len(decode(content).frames) == 6
    combed = apply_filters(decode_stored(content), scale("bt601", "tv", chroma="left"))
    assert measure_combing(decode(content).frames) < 0.5 * measure_combing(combed)


def measure_combing(frames: np.ndarray) -> float:
    """Measure how much lines differ from the mean of their two neighbours."""
    lines = frames.astype(float)
    return float(np.abs(lines[:, 1:-1] - (lines[:, :-2] + lines[:, 2:]) / 2).mean())


def test_a_deinterlaced_frame_is_the_same_wherever_reading_begins(write_video, textured):
    content = write_video(interlace(textured, 40), **INTERLACED, options={**FIELDS, "g": "5", "bf": "0"})
    whole = decode(content).frames
    np.testing.assert_array_equal(decode(content, start=2.0, frames=3).frames, whole[20:23])
    np.testing.assert_array_equal(decode(content, start=3.9).frames, whole[39:])
    np.testing.assert_array_equal(decode(content, fps=5, start=1.6, frames=3).frames, whole[[16, 18, 20]])


def test_progressive_frames_among_interlaced_ones_stay_as_they_are(write_video, textured):
    """Both kinds are in one file, from two encoders with the same header."""
    smooth = textured(4, 32, 64)
    first = write_video(
        interlace(textured, 4), codec="mpeg2video", format="mpegts", pixel_format="yuv420p", options=MPEG2
    )
    plain = {name: value for name, value in MPEG2.items() if name != "flags"}
    second = write_video(
        smooth,
        codec="mpeg2video",
        format="mpegts",
        pixel_format="yuv420p",
        options=plain,
        first=4,
    )
    content = first + second
    flags = [frame.interlaced_frame for frame in decode_stored(content)]
    assert flags == [True] * 4 + [False] * 4
    result = decode(content).frames
    assert result.shape == (8, 32, 64, 3)
    bwdif = ("bwdif", "mode=send_frame:parity=auto:deint=interlaced")
    np.testing.assert_array_equal(
        result, apply_filters(decode_stored(content), bwdif, scale("bt601", "tv", chroma="left"))
    )
    np.testing.assert_array_equal(result[4:], decode(second).frames)


MPEG2 = {"flags": "+ilme+ildct", "qmin": "1", "qmax": "2", "bf": "0", "b": "20M"}
