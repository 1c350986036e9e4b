"""Preview decoders, fitted to maps that are known."""

import numpy as np
import pytest

from dit_video.core.errors import MissingError, UserError
from dit_video.sampling.preview import MAX_QUADRATIC_CHANNELS, PreviewFit, load_preview_decoder
from dit_video.tokens import Grid
from dit_video.weights import save

STRIDE, CHANNELS = Grid(2, 4, 4), 3


def draw_latents(grid, *, channels=CHANNELS, seed=0):
    return np.random.default_rng(seed).standard_normal((*grid, channels)).astype(np.float32)


def decode_by_hand(latents, *, stride=STRIDE, is_quadratic=True):
    """Return the frames of a smooth map of each latent: every pixel of its patch is a polynomial of its channels."""
    t, h, w = latents.shape[:3]
    first = latents[..., 0, None, None, None, None]
    last = latents[..., -1, None, None, None, None]
    a, b, c, colour = np.meshgrid(*(np.arange(each) for each in (*stride, 3)), indexing="ij")
    values = 120 + 20 * first - 9 * last + (b - c) * 3 * last + 4 * a * first + 10 * colour
    if is_quadratic:
        values = values + 3 * first * last + 2 * (colour - 1) * (last**2 - 1)
    frames = values.transpose(0, 3, 1, 4, 2, 5, 6).reshape(t * stride.t, h * stride.h, w * stride.w, 3)
    return np.clip(np.rint(frames), 0, 255).astype(np.uint8)[stride.t - 1 :]


def fit(*, clips=6, grid=Grid(4, 24, 32), channels=CHANNELS, **options):
    fitted = PreviewFit(STRIDE, channels)
    for seed in range(clips):
        latents = draw_latents(grid, channels=channels, seed=seed)
        fitted.add(latents, decode_by_hand(latents, **options))
    return fitted.solve()


@pytest.fixture(scope="module")
def decoder():
    return fit()


def largest_difference(a, b):
    return np.abs(a.astype(int) - b).max()


@pytest.mark.parametrize("channels", [CHANNELS, MAX_QUADRATIC_CHANNELS + 1])
def test_a_map_of_its_features_is_recovered(channels):
    """Products of channels are features of latents with few channels."""
    is_quadratic = channels <= MAX_QUADRATIC_CHANNELS
    decoder = fit(channels=channels, is_quadratic=is_quadratic)
    assert decoder.is_quadratic == is_quadratic
    latents = draw_latents((3, 5, 6), channels=channels, seed=100)
    clip = decoder.decode(latents, fps=12)
    assert clip.fps == 12
    assert clip.frames.shape == (5, 20, 24, 3)
    assert largest_difference(clip.frames, decode_by_hand(latents, is_quadratic=is_quadratic)) <= 3


def test_an_image_is_the_first_frame_of_its_clip(decoder):
    latents = draw_latents((3, 2, 3), seed=100)
    clip = decoder.decode(latents, fps=8)
    assert len(clip.frames) == 5
    np.testing.assert_array_equal(decoder.decode(latents[:1], fps=8).frames, clip.frames[:1])
    assert largest_difference(clip.frames[:1], decode_by_hand(latents[:1])) <= 2


def test_images_alone_are_enough_to_fit(decoder):
    images = fit(grid=Grid(1, 24, 32))
    latents = draw_latents((1, 2, 3), seed=100)
    assert largest_difference(images.decode(latents, fps=1).frames, decoder.decode(latents, fps=1).frames) <= 6


def test_a_single_small_clip_gives_a_decoder_that_later_clips_improve():
    fitted, errors = PreviewFit(STRIDE, CHANNELS), []
    latents = draw_latents((3, 5, 6), seed=100)
    with pytest.raises(UserError, match="at least one"):
        fitted.solve()
    for seed in range(12):
        example = draw_latents((3, 4, 4), seed=seed)
        fitted.add(example, decode_by_hand(example))
        decoded = fitted.solve().decode(latents, fps=8)
        errors.append(np.abs(decoded.frames.astype(int) - decode_by_hand(latents)).mean())
    assert fitted.clips == 12
    assert errors[0] < 15
    assert errors[-1] < 0.5 * errors[0]


@pytest.mark.parametrize(
    ("max_side", "factor", "step"), [(1000, 1, 1), (128, 1, 1), (127, 2, 1), (64, 2, 1), (40, 4, 1), (20, 4, 2)]
)
def test_larger_pictures_are_reduced_by_a_whole_number(decoder, max_side, factor, step):
    latents = draw_latents((2, 24, 32), seed=100)
    full = decoder.decode(latents[:, ::step, ::step], fps=8).frames
    reduced = decoder.decode(latents, fps=8, max_side=max_side).frames
    height, width = full.shape[1] // factor, full.shape[2] // factor
    assert reduced.shape == (3, height, width, 3)
    assert max(height, width) <= max_side
    means = full.reshape(3, height, factor, width, factor, 3).mean(axis=(2, 4))
    # Pixels that are clipped at full size are averaged before.
    assert np.mean(np.abs(means - reduced) < 1.5) > 0.98


def test_chunks_of_a_large_clip_are_those_of_its_parts(decoder):
    latents = draw_latents((6, 80, 90), seed=100)
    whole = decoder.decode(latents, fps=8).frames
    assert len(whole) == 11
    for index in range(6):
        image = decoder.decode(latents[index : index + 1], fps=8).frames
        np.testing.assert_array_equal(whole[2 * index : 2 * index + 1], image)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
def test_early_estimates_of_any_size_are_decoded(decoder, value):
    latents = draw_latents((3, 2, 3), seed=100)
    expected = decoder.decode(latents, fps=8).frames
    latents[1, 0, 0] = value
    frames = decoder.decode(latents, fps=8).frames
    np.testing.assert_array_equal(np.delete(frames, [1, 2], axis=0), np.delete(expected, [1, 2], axis=0))
    np.testing.assert_array_equal(frames[:, :, 4:], expected[:, :, 4:])


def test_a_file_holds_the_decoder(decoder, tmp_path):
    path = tmp_path / "preview.safetensors"
    decoder.save(path)
    loaded = load_preview_decoder(path)
    assert (loaded.stride, loaded.channels, loaded.is_quadratic) == (STRIDE, CHANNELS, True)
    latents = draw_latents((3, 5, 6), seed=100)
    assert largest_difference(loaded.decode(latents, fps=8).frames, decoder.decode(latents, fps=8).frames) <= 1
    with pytest.raises(MissingError):
        load_preview_decoder(tmp_path / "other.safetensors")
    save(tmp_path / "other.safetensors", {"kernel": np.zeros(3)})
    with pytest.raises(UserError, match=r"no preview decoder.*fit_preview_decoder\.py"):
        load_preview_decoder(tmp_path / "other.safetensors")


def test_mistakes_are_refused(decoder):
    latents = draw_latents((2, 4, 4))
    with pytest.raises(UserError, match=r"\[2, 4, 4, 2\].*\[t h w 3\]"):
        decoder.decode(latents[..., :2], fps=8)
    with pytest.raises(UserError, match=r"max_side=0.*at least 1"):
        decoder.decode(latents, fps=8, max_side=0)
    fitted = PreviewFit(STRIDE, CHANNELS)
    with pytest.raises(UserError, match=r"\[2, 4, 4, 3\].*\[3, 4, 4, 3\]"):
        fitted.add(latents, np.zeros((5, 16, 16, 3), np.uint8))
    with pytest.raises(UserError, match="NaN"):
        fitted.add(latents * np.float32(np.nan), np.zeros((3, 16, 16, 3), np.uint8))
