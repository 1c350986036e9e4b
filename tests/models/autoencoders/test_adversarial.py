import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dit_video.core import config_json
from dit_video.core.errors import UserError
from dit_video.models.autoencoders import R1, AdversarialConfig, AutoencoderObjective, LeCam
from dit_video.models.autoencoders.adversarial import (
    compute_adaptive_weight,
    discriminator_loss,
    generator_loss,
    lecam_loss,
    r1_penalty,
)
from dit_video.nn import get_graph_def, init_params


def verdicts(*values):
    """Return logits of two clips, equal within each clip."""
    return jnp.broadcast_to(jnp.asarray(values, jnp.float32)[None, :, None, None], (2, len(values), 1, 1))


def test_the_hinge_loss_is_zero_beyond_a_margin_of_one():
    assert discriminator_loss(verdicts(1.0, 3.0), verdicts(-1.0, -2.0)).tolist() == [0, 0]
    assert discriminator_loss(verdicts(0.0, 3.0), verdicts(0.5, -2.0)).tolist() == [0.5 * (0.5 + 0.75)] * 2
    assert generator_loss(verdicts(1.0, 2.0)).tolist() == [-1.5, -1.5]


def test_lecam_holds_verdicts_to_the_mean_of_the_other_kind():
    means = {"real_mean": jnp.asarray(0.5), "fake_mean": jnp.asarray(-0.25)}
    assert lecam_loss(verdicts(-0.25), verdicts(0.5), **means).tolist() == [0, 0]
    assert lecam_loss(verdicts(-5.0), verdicts(5.0), **means).tolist() == [0, 0]  # as in the authors' code
    np.testing.assert_allclose(lecam_loss(verdicts(0.75), verdicts(-0.5), **means), [2.0, 2.0])


def test_r1_is_the_squared_gradient_a_verdict_whatever_the_size():
    def judge(pixels):  # a verdict is 3 times the first channel of its pixel
        return 3 * pixels[..., 0]

    for size in ((1, 1, 1), (2, 4, 3)):
        np.testing.assert_allclose(r1_penalty(judge, jnp.ones((2, *size, 3))), [9.0, 9.0], rtol=1e-6)


def test_the_adaptive_weight_is_a_ratio_of_norms_with_a_bound():
    assert compute_adaptive_weight(jnp.asarray([3.0, 4.0]), jnp.asarray([[0.5]])) == pytest.approx(5 / 0.5001)
    assert compute_adaptive_weight(jnp.asarray([3e6]), jnp.asarray([0.0])) == 1e4
    assert compute_adaptive_weight(jnp.asarray([0.0]), jnp.asarray([1.0])) == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdversarialConfig(weight=0.0), "weight=0.0.*use weight > 0"),
        (lambda: AdversarialConfig(start_step=-1), "start_step=-1.*start_step >= 0"),
        (lambda: AdversarialConfig(learning_rate=float("nan")), "finite learning_rate > 0"),
        (lambda: AdversarialConfig(learning_rate=float("inf")), "finite learning_rate > 0"),
        (lambda: AdversarialConfig(layers=0), "layers=0.*at least 1"),
        (lambda: R1(every=0), "every >= 1"),
        (lambda: R1(weight=-1.0), "weight=-1.0.*weight > 0"),
        (lambda: LeCam(decay=1.0), r"decay in \[0, 1\)"),
    ],
)
def test_wrong_values_are_refused(make, message):
    with pytest.raises(UserError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("regulariser", [None, R1(every=4), LeCam(weight=0.3)], ids=str)
def test_a_config_is_the_same_after_json(regulariser):
    objective = AutoencoderObjective(adversarial=AdversarialConfig(start_step=100, regulariser=regulariser))
    assert config_json.from_json(json.loads(json.dumps(config_json.to_json(objective)))) == objective


# Discriminator


CONFIG = AdversarialConfig(width=4, layers=2)
PARAMS = jax.jit(init_params, static_argnums=0)(CONFIG.make, jax.random.key(0))
CLIP = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 5, 12, 8, 3)), jnp.float32)


@jax.jit
def judge(pixels):
    return nnx.merge(get_graph_def(CONFIG.make), PARAMS)(pixels)


@pytest.mark.parametrize(
    ("size", "verdicts"), [((5, 12, 8), (2, 3, 2)), ((1, 8, 8), (1, 2, 2)), ((4, 4, 7), (1, 1, 1))]
)
def test_a_verdict_for_every_patch_of_clips_and_images(size, verdicts):
    assert jax.eval_shape(judge, jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)).shape == (2, *verdicts)


def test_a_verdict_depends_on_its_own_clip_and_on_frames_before_and_after():
    verdicts = judge(CLIP)
    np.testing.assert_array_equal(judge(CLIP.at[0].set(0))[1], verdicts[1])
    for frame, seen in ((4, 0), (0, 1)):  # of frame 4 the first verdicts know, of frame 0 the last
        assert (judge(CLIP.at[:, frame].set(0))[:, seen] != verdicts[:, seen]).any()


def test_all_places_but_the_borders_are_judged_alike():
    wide = jnp.asarray(np.random.default_rng(1).uniform(-1, 1, (1, 1, 64, 64, 3)), jnp.float32)
    moved = jnp.roll(wide, 4, axis=3)
    np.testing.assert_allclose(judge(moved)[..., 8:10], judge(wide)[..., 7:9], rtol=1e-5, atol=1e-6)
