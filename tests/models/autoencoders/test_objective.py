import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_video.core import config_json
from dit_video.core.errors import UserError
from dit_video.models.autoencoders import AutoencoderObjective

DECODED, ORIGINAL = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 2, 3, 8, 8, 3)), jnp.float32)


def test_an_objective_returns_its_weighted_parts_by_name():
    objective = AutoencoderObjective(absolute=0.5, charbonnier=2.0, pyramid=0.0, frequency=3.0, temporal=0.25)
    value, parts = jax.jit(objective.compare)(DECODED, ORIGINAL)
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
