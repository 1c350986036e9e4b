"""Streams in chunks and tiles, compared with whole clips, for models with random parameters."""

import dataclasses
import functools
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from dit_video.core import pixels
from dit_video.core.errors import UserError
from dit_video.models.autoencoders import (
    Tiles,
    decode_stream,
    encode_stream,
    fit_linear,
    make_linear_path,
    measure_tiling_error,
    streaming,
)
from dit_video.models.autoencoders.streaming import compute_blend_weights, cut_tiles
from dit_video.nn import get_graph_def, init_params
from dit_video.tokens import Grid
from support.devices import PROGRAMS, check_on_eight_devices, make_environment
from support.marks import mark_nightly_except
from support.random_params import make_random_params
from support.tiny_autoencoders import CONFIGS, assert_frames_are_close

FRAMES = np.random.default_rng(0).integers(0, 256, (2, 9, 16, 24, 3), np.uint8)


@functools.cache
def setting(name):
    """Return a config, parameters, and the latents and frames of the whole clip."""
    config = CONFIGS[name]
    params = make_random_params(config.make)
    graph = get_graph_def(config.make)
    latents = jax.jit(lambda params, x: nnx.merge(graph, params).encode(x))(params, pixels.to_float(FRAMES))
    decoded = jax.jit(lambda params, x: nnx.merge(graph, params).decode(x))(params, latents)
    return config, params, np.asarray(latents), pixels.to_uint8(np.asarray(decoded))


@pytest.mark.parametrize(
    ("name", "chunk"),
    [
        ("patches", 2),
        ("patches", 7),
        ("preactivated patches", 2),
        ("patches with finer levels", 2),
        pytest.param("levels", 2, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_streamed_chunks_equal_the_whole_clip(name, chunk):
    config, params, latents, decoded = setting(name)
    portions = (FRAMES[:, start : start + 4] for start in range(0, 9, 4))  # no multiple of what is asked for
    encoded = list(encode_stream(config, params, portions, chunk=chunk))
    assert [part.shape[1] for part in encoded] == [min(chunk, 5 - start) for start in range(0, 5, chunk)]
    np.testing.assert_allclose(np.concatenate(encoded, axis=1), latents, atol=1e-5)
    frames = list(decode_stream(config, params, [latents], chunk=chunk))
    assert frames[0].dtype == np.uint8
    assert frames[0].shape[1] == 1 + 2 * (min(chunk, 5) - 1)
    assert_frames_are_close(np.concatenate(frames, axis=1), decoded)
    portions = (latents[:, start:stop] for start, stop in ((0, 1), (1, 1), (1, 4), (4, 5)))
    for streamed, expected in zip(decode_stream(config, params, portions, chunk=chunk), frames, strict=True):
        np.testing.assert_array_equal(streamed, expected)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_pixels_that_are_not_finite_are_no_colours(value):
    config, params, latents, _ = setting("patches")
    assert len(list(decode_stream(config, params, [latents], chunk=2))) == 3
    damaged = latents.copy()
    damaged[1, -1, 0, 0, 0] = value
    stream = decode_stream(config, params, [damaged], chunk=2)
    next(stream)  # the first frames do not see it
    with pytest.raises(UserError, match="1 of 2 clips are NaN or infinite"):
        list(stream)


def test_clips_of_any_length_need_two_programs():
    config, params, latents, _ = setting("patches")
    other = dataclasses.replace(config, width=10)  # a program of its own
    params = make_random_params(other.make)
    for length in (1, 2, 3, 5):
        list(decode_stream(other, params, [latents[:, :length]], chunk=2))
    assert streaming._jit_method(other, "decode")._cache_size() == 2


def test_pixels_go_to_the_device_and_come_from_it_as_uint8(monkeypatch):
    config, params, latents, _ = setting("patches")
    whole = cut_tiles(*latents.shape[2:4], None, config.stride)
    decoded, *_ = next(streaming._run_chunks(config, params, [latents[:, :2]], whole, "decode", 2, None))
    assert isinstance(decoded, jax.Array)
    assert decoded.dtype == np.uint8
    dtypes, run = [], streaming._jit_method(config, "encode")
    monkeypatch.setattr(
        streaming,
        "_jit_method",
        lambda *_: lambda params, frames, cached: dtypes.append(frames.dtype) or run(params, frames, cached),
    )
    list(encode_stream(config, params, iter([FRAMES]), chunk=2))
    assert set(dtypes) == {np.dtype(np.uint8)}


def test_frame_counts_and_chunks_that_do_not_fit_are_refused():
    config, params, *_ = setting("patches")
    with pytest.raises(UserError, match=r"T=8 is not 1 \+ 2k"):
        list(encode_stream(config, params, [FRAMES[:, :8]], chunk=2))
    with pytest.raises(UserError, match="at least one frame"):
        list(encode_stream(config, params, [], chunk=2))
    with pytest.raises(UserError, match="chunk=0"):
        list(decode_stream(config, params, [np.zeros((1, 1, 4, 6, 3), np.float32)], chunk=0))


@pytest.mark.wrong_types
def test_arrays_that_are_no_frames_or_latents_are_refused():
    config, params, _, _ = setting("patches")
    real = FRAMES.astype(np.float32)
    for frames in (FRAMES[..., :2], FRAMES[0], real - 128, real * np.nan, real.astype(np.float64)):
        with pytest.raises(UserError, match=r"frames .* must be \[B T H W 3\] in 0..255.* Use frames of this shape"):
            list(encode_stream(config, params, iter([frames])))
    latents = np.zeros((1, 1, 4, 6, 3), np.float32)
    for portions, message in (
        ([latents[..., [0, 0, 1, 2]]], r"latents \[1, 1, 4, 6, 4\] .*\[B t h w 3\]"),
        (latents, r"latents \[1, 4, 6, 3\] .*such as \[latents\]"),
        ([latents, latents[:, :, :2]], r"latents \[1, 1, 2, 6, 3\] are invalid after \[1, 1, 4, 6, 3\]"),
        ([latents[:, :0]], "at least one latent frame"),
        ([], "at least one latent frame"),
    ):
        with pytest.raises(UserError, match=message):
            list(decode_stream(config, params, portions, chunk=2))


def test_weights_of_tiles_sum_to_one():
    stride = Grid(1, 4, 4)
    for height, width in ((4, 6), (7, 9), (23, 10)):
        plan = cut_tiles(height, width, Tiles(height=20, width=24, overlap=8), stride)
        total = np.zeros((height * 4, width * 4), np.float32)
        for tile in plan:
            rows, columns = (
                slice(tile.row * 4, (tile.row + tile.height) * 4),
                slice(tile.column * 4, (tile.column + tile.width) * 4),
            )
            total[rows, columns] += compute_blend_weights(plan, tile, (4, 4))
        np.testing.assert_allclose(total, 1, atol=1e-6)
        assert len({(tile.height, tile.width) for tile in plan}) == 1
    assert len(plan) == 7 * 2


TILES = Tiles(height=48, width=48, overlap=16)


@functools.cache
def ramp():
    """Return the latents of a smooth ramp of brightness, and their frames."""
    config, params, *_ = setting("levels")
    rising = np.linspace(0, 255, 96)[None, :, None] * np.linspace(0.3, 1, 112)[None, None]
    clip = np.broadcast_to(rising.astype(np.uint8)[..., None], (1, 3, 96, 112, 3)).copy()
    latents = np.concatenate(list(encode_stream(config, params, [clip])), axis=1)
    return config, params, clip, latents


def seam(difference):
    """Return the largest step of an error between neighbouring rows or columns, which makes a tile's border visible."""
    return max(np.abs(np.diff(difference, axis=axis)).max() for axis in (2, 3))


@pytest.mark.slow
def test_tiles_leave_no_seam_on_a_ramp():
    config, params, _, latents = ramp()
    whole, tiled, butted = (
        np.concatenate(list(decode_stream(config, params, [latents], tiles=tiles)), axis=1).astype(int)
        for tiles in (None, TILES, Tiles(height=48, width=48, overlap=0))
    )
    assert tiled.shape == whole.shape
    assert 0 < seam(tiled - whole) < 0.4 * seam(butted - whole)
    error = measure_tiling_error(config, params, latents, TILES)
    assert error.largest == pytest.approx(np.abs(tiled - whole).max() / 127.5)
    assert 0 < error.mean < 0.02


@pytest.mark.slow
def test_a_blend_of_equal_tiles_is_exact():
    """A decoder of principal components sees no neighbouring patches, so that only the blend could differ."""
    _, _, clip, _ = ramp()
    config = CONFIGS["patches"]
    linear = fit_linear([pixels.to_float(clip)], stride=config.stride, channels=config.channels)
    params = jax.jit(init_params, static_argnums=0)(config.make, jax.random.key(0)) | make_linear_path(linear)
    latents = np.concatenate(list(encode_stream(config, params, [clip])), axis=1)
    assert measure_tiling_error(config, params, latents, TILES).largest <= 1 / 127.5


@pytest.mark.slow
def test_tiles_of_latents():
    config, params, clip, latents = ramp()
    tiled = np.concatenate(list(encode_stream(config, params, [clip], tiles=TILES)), axis=1)
    assert tiled.shape == latents.shape
    assert np.abs(tiled - latents).mean() < 0.05 * np.abs(latents).mean()


@pytest.mark.slow
def test_a_wider_overlap_is_closer_to_the_whole():
    config, params, _, latents = ramp()
    errors = [
        measure_tiling_error(config, params, latents, Tiles(height=48, width=48, overlap=overlap)).mean
        for overlap in (0, 8, 20)
    ]
    assert errors[0] > errors[1] > errors[2] > 0


@pytest.mark.parametrize(
    ("tiles", "message"),
    [
        ({"height": 20, "width": 24, "overlap": 10}, "less than half a side"),
        ({"height": 20, "width": 24, "overlap": -1}, "less than half a side"),
    ],
)
def test_invalid_tiles_are_refused(tiles, message):
    with pytest.raises(UserError, match=message):
        Tiles(**tiles)


def test_tiles_that_the_stride_does_not_divide_are_refused():
    config, params, latents, _ = setting("patches")
    with pytest.raises(UserError, match="overlap 2 is not divisible by the spatial stride 4"):
        list(decode_stream(config, params, [latents], tiles=Tiles(height=8, width=8, overlap=2)))


@pytest.mark.slow
def test_a_height_over_eight_devices_gives_the_same_stream():
    check_on_eight_devices("streaming_over_devices.py")


def test_a_height_that_the_devices_do_not_divide_is_refused():
    config, params, *_ = setting("patches")
    mesh = jax.sharding.AbstractMesh((8,), ("context",))
    rows = NamedSharding(mesh, PartitionSpec(None, None, "context"))
    with pytest.raises(UserError, match="12 latent rows are not divisible by the 8 devices"):
        list(decode_stream(config, params, [np.zeros((1, 1, 12, 4, 3), np.float32)], sharding=rows))


@pytest.mark.slow
@pytest.mark.parametrize("frames", mark_nightly_except((481,), (481, 1441)))
def test_a_long_video_needs_the_memory_of_a_few_seconds(frames):
    """481 frames are twenty seconds, and 1441 a minute."""
    command, environment = [sys.executable, str(PROGRAMS / "streaming_memory.py")], make_environment(1)
    peaks = []
    for count in (81, frames):
        process = subprocess.run([*command, str(count)], env=environment, check=True, capture_output=True, text=True)
        peaks.append(int(process.stdout))
    assert peaks[1] <= 1.1 * peaks[0], peaks
