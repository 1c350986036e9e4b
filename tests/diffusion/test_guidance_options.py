"""CFG-Zero* and skip-layer guidance: identities, and options that do not fit."""

import jax.numpy as jnp
import numpy as np
import pytest

from dit_video.core import config_json
from dit_video.core.errors import UserError
from dit_video.diffusion import (
    AdaptiveProjectedGuidance,
    Epsilon,
    Guidance,
    SkipLayerGuidance,
    ZeroStarGuidance,
    apply_guidance,
    sequential,
    stateless,
)

NOISY = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4)), jnp.float32)
TIMES = np.linspace(1.0, 0.0, 11).astype(np.float32)
SKIP = SkipLayerGuidance(layers=(1,), scale=2.0, start=0.2, stop=0.6)


def conditional(noisy, time):
    return 2 * noisy + time


def unconditional(noisy, time):
    return jnp.sin(noisy) - time


def guide(guidance, time, *, weaker=jnp.cos, branches=(conditional, unconditional)):
    """Return the guided prediction of NOISY."""
    denoise = apply_guidance(
        sequential(*map(stateless, branches[: guidance.branch_count])),
        guidance.get_params(times=TIMES),
        skipped=stateless(lambda noisy, time: weaker(noisy)),
    )
    return denoise(NOISY, jnp.asarray(time), None)[0]


def test_the_length_of_the_unconditional_prediction_does_not_matter_with_zero_star():
    guidance = Guidance(scale=3.0, zero_star=ZeroStarGuidance(zero_steps=0))
    expected = guide(guidance, 1.0)
    longer = guide(guidance, 1.0, branches=(conditional, lambda noisy, time: 7 * unconditional(noisy, time)))
    np.testing.assert_allclose(longer, expected, rtol=1e-4, atol=1e-4)
    assert np.abs(guide(Guidance(scale=3.0), 1.0) - expected).max() > 0.1
    # A multiple of the conditional prediction is no guidance at all.
    parallel = guide(guidance, 1.0, branches=(conditional, lambda noisy, time: -0.3 * conditional(noisy, time)))
    np.testing.assert_allclose(parallel, conditional(NOISY, 1.0), rtol=1e-4, atol=1e-4)
    zero = guide(guidance, 1.0, branches=(conditional, lambda noisy, time: 0 * noisy))
    np.testing.assert_allclose(zero, 3 * conditional(NOISY, 1.0), rtol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_first_steps_of_zero_star_change_nothing(scale):
    guidance = Guidance(scale=scale, zero_star=ZeroStarGuidance(zero_steps=2))
    results = [np.abs(guide(guidance, time)).max() for time in TIMES[:4]]
    assert [result == 0 for result in results] == [True, True, False, False]


def test_equal_predictions_without_layers_change_nothing():
    guidance = Guidance(scale=3.0, skip_layers=SKIP)
    result = guide(guidance, TIMES[4], weaker=lambda noisy: conditional(noisy, TIMES[4]))
    np.testing.assert_allclose(result, guide(Guidance(scale=3.0), TIMES[4]), rtol=1e-5, atol=1e-6)


def test_skip_layer_guidance_needs_no_unconditional_branch_and_has_its_own_steps():
    guidance = Guidance(scale=1.0, skip_layers=SKIP)
    assert (guidance.branch_count, guidance.is_active, Guidance(scale=1.0).is_active) == (1, True, False)
    for step, time in enumerate(TIMES[:-1]):
        c = conditional(NOISY, time)
        expected = c + 2.0 * (c - jnp.cos(NOISY)) if 2 < step < 6 else c
        np.testing.assert_allclose(guide(guidance, time), expected, rtol=1e-5, atol=1e-5, err_msg=str(step))
    few = SkipLayerGuidance(layers=(1,)).get_params(np.asarray([1.0, 0.5, 0.0]))
    assert few.interval[0] > few.interval[1]  # no step lies between 1 % and 20 % of two steps


def test_guidance_outside_of_its_interval_is_still_led_away_from_the_model_without_layers():
    guidance = Guidance(scale=3.0, interval=(0.0, 0.1), skip_layers=SKIP)
    c = conditional(NOISY, TIMES[4])
    np.testing.assert_allclose(guide(guidance, TIMES[4]), c + 2.0 * (c - jnp.cos(NOISY)), rtol=1e-5, atol=1e-5)


def test_guidance_with_all_options_survives_json():
    guidance = Guidance(scale=3.0, zero_star=ZeroStarGuidance(zero_steps=2), skip_layers=SKIP)
    assert config_json.from_json(config_json.to_json(guidance)) == guidance


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ZeroStarGuidance(zero_steps=-1), "zero_steps=-1"),
        (lambda: ZeroStarGuidance(zero_steps=10).get_zero_above(TIMES), r"zero_steps=10 .* Use a smaller one"),
        (lambda: SkipLayerGuidance(layers=()), r"layers=\(\) .* Use \(7, 8, 9\)"),
        (lambda: SkipLayerGuidance(layers=(1, 1)), r"layers=\(1, 1\)"),
        (lambda: SkipLayerGuidance(layers=(-1,)), r"layers=\(-1,\)"),
        (lambda: SkipLayerGuidance(layers=(1,), scale=float("inf")), "scale=inf .* Use 0"),
        (lambda: SkipLayerGuidance(layers=(1,), start=0.5, stop=0.2), r"start=0.5, stop=0.2 .* Use start=0.01"),
        (lambda: SKIP.check(1), r"skip_layers=\(1,\) .* the model has 1 layers"),
        (lambda: SkipLayerGuidance(layers=(0, 1)).check(2), r"skip_layers=\(0, 1\) .* 2 layers"),
        (lambda: Guidance(zero_star=ZeroStarGuidance(), image_scale=2.0), "Use zero_star=None"),
        (
            lambda: Guidance(zero_star=ZeroStarGuidance(), projection=AdaptiveProjectedGuidance()),
            "Use zero_star=None",
        ),
        (
            lambda: apply_guidance(
                sequential(stateless(conditional), stateless(unconditional)),
                Guidance(zero_star=ZeroStarGuidance()).get_params(times=TIMES),
                prediction=Epsilon(),
            ),
            "invalid for Epsilon: .* Use zero_star=None",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()
