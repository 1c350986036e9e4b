import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_video.core import config_json
from dit_video.core.errors import UserError
from dit_video.models.autoencoders import AutoencoderObjective, objective

DECODED, ORIGINAL = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 2, 3, 8, 8, 3)), jnp.float32)


def test_an_objective_returns_its_weighted_parts_by_name():
    weighted = AutoencoderObjective(absolute=0.5, charbonnier=2.0, pyramid=0.0, frequency=3.0, temporal=0.25)
    value, parts = jax.jit(weighted.compare)(DECODED, ORIGINAL)
    assert parts.keys() == {"absolute", "charbonnier", "frequency", "temporal"}
    error = DECODED - ORIGINAL
    expected = 0.5 * objective.absolute_error(error) + 2 * objective.charbonnier_loss(error)
    expected += 3 * objective.frequency_loss(error) + 0.25 * objective.temporal_loss(error)
    np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_the_default_sees_edges_frequencies_and_flicker():
    assert jax.eval_shape(AutoencoderObjective().compare, DECODED, ORIGINAL)[1].keys() == {
        "absolute",
        "pyramid",
        "frequency",
        "temporal",
    }
    assert jax.eval_shape(AutoencoderObjective.pixels().compare, DECODED, ORIGINAL)[1].keys() == {"squared", "absolute"}


def test_a_perceptual_net_sees_both_clips():
    objective = AutoencoderObjective.pixels()
    judged = dataclasses.replace(objective, lpips=0.5, lpips_weights="lpips.safetensors")
    plain, _ = objective.compare(DECODED, ORIGINAL)
    value, parts = judged.compare(DECODED, ORIGINAL, lambda one, other: jnp.asarray([one[0, 0, 0, 0, 0], other.max()]))
    np.testing.assert_allclose(parts["lpips"], [DECODED[0, 0, 0, 0, 0], ORIGINAL.max()])
    np.testing.assert_allclose(value, plain + 0.5 * parts["lpips"], rtol=1e-6)
    with pytest.raises(ValueError, match="pass perceptual_net"):
        judged.compare(DECODED, ORIGINAL)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kl": -1.0}, "kl=-1.0 .*at least 0"),
        ({"pyramid": float("nan")}, "pyramid=nan .*at least 0"),
        ({"absolute": 0.0, "pyramid": 0.0, "frequency": 0.0, "temporal": 0.0}, "compares no pixels; give one of"),
        ({"lpips": 0.5}, "use both or neither"),
        ({"lpips_weights": "lpips.safetensors"}, "use both or neither"),
    ],
)
def test_a_wrong_objective_is_refused(changes, message):
    with pytest.raises(UserError, match=message) as error:
        AutoencoderObjective(**changes)
    assert "\n" not in str(error.value)


def test_an_objective_is_the_same_after_json():
    objective = AutoencoderObjective(lpips=0.5, lpips_weights="a.safetensors", kl=1e-8)
    assert config_json.from_json(json.loads(json.dumps(config_json.to_json(objective)))) == objective


# Losses


MEASURES = (
    objective.absolute_error,
    objective.squared_error,
    objective.log_squared_error,
    objective.charbonnier_loss,
    objective.pyramid_loss,
    objective.frequency_loss,
    objective.temporal_loss,
    objective.gradient_loss,
)


def noise(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


ERROR = noise(0, 2, 3, 6, 5, 3)


@functools.cache
def with_gradient(measure):
    return jax.jit(lambda error: (measure(error), jax.grad(lambda e: measure(e).sum())(error)))


@pytest.mark.parametrize("measure", MEASURES, ids=lambda measure: measure.__name__)
@pytest.mark.parametrize("size", [(1, 1, 1), (2, 1, 7), (3, 6, 5)], ids=str)
def test_one_value_a_clip_for_any_size_with_finite_gradients(measure, size):
    error = noise(1, 2, *size, 3)
    value, gradient = with_gradient(measure)(error)
    assert value.shape == (2,)
    assert np.isfinite(value).all()
    assert np.isfinite(gradient).all()
    differing = {objective.temporal_loss: size[:1], objective.gradient_loss: size}.get(measure, (2,))
    still = max(differing) == 1
    assert (np.abs(gradient).max() > 0) == (not still)


@pytest.mark.parametrize("measure", MEASURES, ids=lambda measure: measure.__name__)
def test_a_clip_s_value_is_its_own_and_without_error_it_is_zero(measure):
    both, alone = with_gradient(measure)(ERROR)[0], with_gradient(measure)(ERROR.at[0].set(0))[0]
    np.testing.assert_allclose(alone[1], both[1], rtol=1e-6)
    assert alone[0] < 2e-3 < both[0]
    still, gradient = with_gradient(measure)(jnp.zeros_like(ERROR))
    assert still.max() <= 1.001e-3  # Charbonnier's epsilon
    assert np.isfinite(gradient).all()


def test_pixel_losses_equal_their_definitions():
    error = jnp.full((1, 2, 3, 4, 3), -0.5, jnp.float32)
    assert objective.absolute_error(error)[0] == pytest.approx(0.5)
    assert objective.squared_error(error)[0] == pytest.approx(0.25)
    assert objective.charbonnier_loss(error, epsilon=1.2)[0] == pytest.approx(1.3)


def test_a_logarithm_counts_a_tenth_less_error_the_same_in_every_clip():
    sizes = jnp.asarray([0.1, 0.8], jnp.float32)[:, None, None, None, None] * jnp.ones((2, 2, 3, 4, 3))
    better = objective.log_squared_error(sizes) - objective.log_squared_error(sizes * np.float32(np.sqrt(0.9)))
    np.testing.assert_allclose(better, -objective.LOG_FLOOR * np.log(0.9), rtol=0.04)
    small = jnp.full((1, 2, 3, 4, 3), 1e-4, jnp.float32)  # below the floor it is the squared error
    np.testing.assert_allclose(objective.log_squared_error(small), objective.squared_error(small), rtol=1e-4)


def test_a_pyramid_of_a_constant_error_is_its_last_level():
    error = jnp.full((1, 1, 16, 16, 3), 0.25, jnp.float32)
    np.testing.assert_allclose(objective.pyramid_loss(error), [0.25], rtol=1e-6)


def test_a_pyramid_adds_what_its_levels_leave():
    """Two levels, compared with NumPy."""
    error = ERROR[:1, :1]
    taps = np.array([1, 4, 6, 4, 1]) / 16
    blurred = np.asarray(error, np.float64)
    for axis in (2, 3):
        padded = np.pad(blurred, [(2, 2) if dim == axis else (0, 0) for dim in range(5)], mode="edge")
        blurred = sum(
            tap * np.take(padded, range(offset, offset + error.shape[axis]), axis) for offset, tap in enumerate(taps)
        )
    expected = np.abs(error - blurred).mean() + np.abs(blurred[:, :, ::2, ::2]).mean()
    np.testing.assert_allclose(
        jax.jit(functools.partial(objective.pyramid_loss, levels=2))(error), [expected], rtol=1e-5
    )


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 3), (5, 8), (8, 5), (6, 2)])
def test_frequencies_are_those_of_the_fast_transform(height, width):
    error = noise(3, 2, 2, height, width, 3)
    power = np.abs(np.fft.fft2(error, axes=(2, 3), norm="ortho")) ** 2
    weight = np.sqrt(power / power.max(axis=(2, 3), keepdims=True))
    expected = (weight * power).mean(axis=(1, 2, 3, 4))
    np.testing.assert_allclose(jax.jit(objective.frequency_loss)(error), expected, rtol=1e-4)


def test_frequencies_without_focus_are_the_squared_error():
    np.testing.assert_allclose(
        jax.jit(functools.partial(objective.frequency_loss, focus=0.0))(ERROR),
        objective.squared_error(ERROR),
        rtol=1e-5,
    )


def test_the_focus_has_no_gradient_of_its_own():
    gradient = with_gradient(objective.frequency_loss)(ERROR)[1]
    spectrum = np.fft.fft2(ERROR, axes=(2, 3), norm="ortho")
    weight = np.abs(spectrum) / np.abs(spectrum).max(axis=(2, 3), keepdims=True)
    expected = 2 * np.fft.ifft2(weight * spectrum, axes=(2, 3), norm="ortho").real / ERROR[0].size
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_the_gradient_loss_is_that_of_jumps_along_each_axis():
    error = jnp.zeros((3, 2, 4, 6, 1)).at[0, 1].set(1.0).at[1, :, 2:].set(1.0).at[2, :, :, 3:].set(2.0)
    np.testing.assert_allclose(objective.gradient_loss(error), [1, 1 / 3, 4 / 5], rtol=1e-6)
    smooth = jnp.linspace(0, 1, 6)[None, None, None, :, None] * jnp.ones((1, 2, 4, 6, 1))
    assert objective.gradient_loss(smooth)[0] < 0.25 * objective.gradient_loss(error)[1]


def test_only_the_temporal_loss_depends_on_flicker():
    still = jnp.full((1, 4, 2, 2, 3), 0.5, jnp.float32)
    flickering = still * jnp.asarray([1.0, -1, 1, -1])[:, None, None, None]
    assert objective.absolute_error(still) == objective.absolute_error(flickering)
    assert objective.temporal_loss(still)[0] == 0
    assert objective.temporal_loss(flickering)[0] == 1
