import warnings
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_video.core import config_json
from dit_video.core.errors import UserError
from dit_video.diffusion import (
    X0,
    AdaptiveProjectedGuidance,
    Epsilon,
    Guidance,
    LearnedVariance,
    RectifiedFlow,
    SkipLayerGuidance,
    V,
    VariancePreservingProcess,
    Velocity,
    ZeroStarGuidance,
    apply_classifier_free_guidance,
    apply_guidance,
    batched,
    sequential,
    stateless,
)
from support.predictions import convert_prediction

NOISY = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4)), jnp.float32)
TIME = jnp.asarray(0.7)


def conditional(noisy, time):
    return 2 * noisy + time


def unconditional(noisy, time):
    return jnp.sin(noisy) - time


def evaluate(denoise, noisy=NOISY, time=TIME):
    """Return the prediction of a `denoise` without state."""
    prediction, state = denoise(noisy, time, None)
    assert state is None
    return prediction


def combine_two(first, second, scale):
    return apply_classifier_free_guidance(stateless(first), stateless(second), scale)


def one_by_one(*branches):
    return sequential(*map(stateless, branches))


def test_scale_1_is_conditional_and_0_unconditional():
    one, zero = (evaluate(combine_two(conditional, unconditional, scale)) for scale in (1.0, 0.0))
    np.testing.assert_allclose(one, conditional(NOISY, TIME), atol=1e-6)
    np.testing.assert_array_equal(zero, unconditional(NOISY, TIME))


@pytest.mark.parametrize("scale", [0, 0.5, (3.0, 0.0)])
def test_a_scale_that_weakens_the_prompt_is_a_warning(scale):
    """Elsewhere every scale up to 1 is no guidance, and recipes of distilled models say 0."""
    with pytest.warns(UserWarning, match="weakens the prompt: 1 is no guidance, and 0 samples the negative prompt"):
        Guidance(scales={"text": scale})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Guidance(scales={"text": 1.0, "image": 0.0})


@pytest.mark.parametrize("scale", [2.0, 7.5, -1.0])
def test_guidance_is_linear_in_the_scale(scale):
    result = evaluate(combine_two(conditional, unconditional, jnp.asarray(scale)))
    expected = scale * conditional(NOISY, TIME) + (1 - scale) * unconditional(NOISY, TIME)
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)


def test_equal_branches_are_not_moved_by_any_scale():
    result = evaluate(combine_two(conditional, conditional, 9.0))
    np.testing.assert_allclose(result, conditional(NOISY, TIME), rtol=1e-6)


ALL = (conditional, unconditional, lambda noisy, time: jnp.cos(noisy) * time)
PROCESS = RectifiedFlow()


def guide(guidance, branches=ALL, **options):
    """Return the guided prediction of NOISY."""
    chosen = one_by_one(*branches[: guidance.branch_count])
    return evaluate(apply_guidance(chosen, guidance.get_params(TIMES), process=PROCESS, **options))


def test_image_and_text_have_separate_scales():
    c, u, b = (np.asarray(branch(NOISY, TIME)) for branch in ALL)
    result = guide(Guidance(scales={"text": 7.5, "image": 1.5}))
    np.testing.assert_allclose(result, b + 1.5 * (u - b) + 7.5 * (c - u), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(guide(Guidance(scales={"text": 1.0, "image": 0.0})), c - u + b, atol=1e-5)


@pytest.mark.parametrize(
    ("guidance", "branches"),
    [
        (Guidance(scales={"text": 1.0}), 1),
        (Guidance(scales={"text": (1.0, 2.0)}), 2),
        (Guidance(scales={"text": 3.0, "image": 1.0}), 2),
        (Guidance(scales={"text": 1.0, "image": 2.0}), 3),
    ],
)
def test_only_needed_branches_are_counted(guidance, branches):
    assert guidance.branch_count == branches == len(guidance.dropped) + 1


def test_an_expert_has_the_branches_that_its_own_scales_need():
    guidance = Guidance(scales={"text": (3.0, 2.0), "motion": (2.0, 1.0), "image": 1.0})
    assert (guidance.branch_count, guidance.dropped) == (3, ("text", "motion"))
    scales = [guidance.get_params(TIMES, expert=expert).scales for expert in (0, 1)]
    assert scales == [(3.0, 2.0), (2.0,)]
    assert guidance.get_params(TIMES, expert=1, branch_count=3).scales == (2.0, 1.0)  # in rows that hold all


def test_all_branches_are_computed_in_one_evaluation():
    calls = []

    def denoise_all(noisy, time):
        calls.append(noisy.shape)
        return jnp.concatenate([branch(part, time) for branch, part in zip(ALL, jnp.split(noisy, 3), strict=True)])

    guidance = Guidance(scales={"text": 4.0, "image": 2.0})
    result = evaluate(apply_guidance(batched(stateless(denoise_all), 3), guidance.get_params(TIMES)))
    np.testing.assert_allclose(result, guide(guidance), atol=1e-6)
    assert calls == [(6, 3, 4)]


@pytest.mark.parametrize("time", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_guidance_is_limited_to_an_interval_of_times(time):
    strength = Guidance(scales={"text": 5.0}, interval=(0.3, 0.7)).get_params(TIMES)
    now = jnp.asarray(time, jnp.float32)
    counted = []

    def second(noisy, time):
        jax.debug.callback(lambda: counted.append(1))
        return unconditional(noisy, time)

    either = one_by_one(conditional, second)
    guided = apply_guidance(either, strength, conditional=stateless(conditional))
    result = evaluate(jax.jit(guided), time=now)
    jax.effects_barrier()
    inside = 0.3 <= time <= 0.7
    scale = 5.0 if inside else 1.0
    expected = evaluate(combine_two(conditional, unconditional, scale), time=now)
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)
    assert len(counted) == inside  # outside it the second branch is not evaluated
    np.testing.assert_allclose(evaluate(apply_guidance(either, strength), time=now), expected, rtol=1e-5, atol=1e-5)


def test_rescaled_predictions_have_the_deviation_of_the_conditional_one():
    c = np.asarray(conditional(NOISY, TIME))
    guided_alone = np.asarray(guide(Guidance(scales={"text": 6.0})))
    whole, half = (np.asarray(guide(Guidance(scales={"text": 6.0}, rescale=phi))) for phi in (1.0, 0.5))
    assert (guided_alone.std(axis=(1, 2)) > 1.5 * c.std(axis=(1, 2))).all()
    np.testing.assert_allclose(whole.std(axis=(1, 2)), c.std(axis=(1, 2)), rtol=1e-4)
    np.testing.assert_allclose(half, (whole + guided_alone) / 2, rtol=1e-4, atol=1e-5)


def test_equal_values_have_no_deviation_to_divide_by():
    still = apply_guidance(
        one_by_one(lambda x, t: 0 * x, lambda x, t: 0 * x),
        Guidance(scales={"text": 3.0}, rescale=1.0).get_params(TIMES),
    )
    np.testing.assert_array_equal(evaluate(still), 0 * NOISY)


def predict_data(velocity):
    return np.asarray(NOISY - TIME * velocity)


def test_projected_steps_are_orthogonal_to_the_data():
    c, u = (branch(NOISY, TIME) for branch in (conditional, unconditional))
    result = predict_data(guide(Guidance(scales={"text": 9.0}, method=AdaptiveProjectedGuidance())))
    data, step = predict_data(c), result - predict_data(c)
    np.testing.assert_allclose((step * data).sum(axis=(1, 2)), 0, atol=1e-3)
    assert (np.linalg.norm(step, axis=(1, 2)) > 1).all()
    everything = guide(Guidance(scales={"text": 9.0}, method=AdaptiveProjectedGuidance(parallel_weight=1.0)))
    np.testing.assert_allclose(everything, u + 9.0 * (c - u), rtol=1e-4, atol=1e-4)


def test_projected_steps_have_a_maximum_length():
    result = predict_data(
        guide(Guidance(scales={"text": 3.0}, method=AdaptiveProjectedGuidance(parallel_weight=1.0, max_rms=0.1)))
    )
    step = result - predict_data(conditional(NOISY, TIME))
    np.testing.assert_allclose(np.sqrt(np.square(step).mean(axis=(1, 2))), 2 * 0.1, rtol=1e-4)


@pytest.mark.parametrize("prediction", [X0(), Epsilon(), V(), Velocity()], ids=lambda kind: type(kind).__name__)
def test_projection_is_of_the_data_whatever_is_predicted(prediction):
    process = VariancePreservingProcess()
    guidance = Guidance(scales={"text": 4.0}, method=AdaptiveProjectedGuidance(max_rms=0.3))

    def data(denoise, kind):
        return kind.estimate(process, NOISY, evaluate(denoise), TIME).data

    def run(branches, kind):
        whole = apply_guidance(one_by_one(*branches), guidance.get_params(TIMES), process=process, prediction=kind)
        return data(whole, kind)

    expected = run((conditional, unconditional), X0())
    result = run(
        [convert_prediction(branch, process, prediction) for branch in (conditional, unconditional)], prediction
    )
    np.testing.assert_allclose(result, expected, rtol=2e-3, atol=2e-3)


def test_a_learned_variance_is_not_guided():
    def combine(branch, variance):
        return lambda x, t: jnp.concatenate([branch(x, t), jnp.full_like(x, variance)], axis=-1)

    guidance = Guidance(scales={"text": 4.0}, rescale=0.5, method=AdaptiveProjectedGuidance(max_rms=0.3))

    def run(branches, prediction):
        process = VariancePreservingProcess()
        guided = apply_guidance(
            one_by_one(*branches), guidance.get_params(TIMES), process=process, prediction=prediction
        )
        return evaluate(guided)

    result = run((combine(conditional, 0.3), combine(unconditional, -0.8)), LearnedVariance())
    values, variance = jnp.split(result, 2, axis=-1)
    np.testing.assert_allclose(values, run((conditional, unconditional), Epsilon()), rtol=1e-5)
    np.testing.assert_array_equal(variance, jnp.full_like(NOISY, 0.3))


@pytest.mark.parametrize(
    "guidance", [Guidance(scales={"text": 6.0}, rescale=0.7), Guidance(method=AdaptiveProjectedGuidance(max_rms=0.2))]
)
def test_samples_of_a_batch_do_not_depend_on_each_other(guidance):
    def run(noisy):
        guided = apply_guidance(one_by_one(conditional, unconditional), guidance.get_params(TIMES), process=PROCESS)
        return evaluate(guided, noisy)

    changed = run(NOISY.at[1].mul(50.0))
    np.testing.assert_allclose(changed[0], run(NOISY)[0], rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Guidance(scales={"text": -1.0}), "guidance scales={'text': -1.0} are invalid: .* Use 1"),
        (lambda: Guidance(scales={"text": (2.0, float("nan"))}), r"scales={'text': \(2.0, nan\)} are invalid"),
        (lambda: Guidance(scales={"image": float("inf")}), "guidance scales={'image': inf} are invalid"),
        (lambda: Guidance(interval=(0.7, 0.3)), r"interval=\(0.7, 0.3\) is invalid"),
        (lambda: Guidance(interval=(0.0, 1.5)), "Use two rising times"),
        (lambda: Guidance(rescale=1.5), r"rescale=1.5 is invalid: it must lie in \[0, 1\]"),
        (lambda: AdaptiveProjectedGuidance(max_rms=0.0), "max_rms=0.0 is invalid"),
        (lambda: AdaptiveProjectedGuidance(parallel_weight=float("inf")), "parallel_weight=inf is invalid"),
        (
            lambda: evaluate(
                apply_guidance(one_by_one(*ALL[:2]), Guidance(method=AdaptiveProjectedGuidance()).get_params(TIMES))
            ),
            "Use process=",
        ),
    ],
)
def test_invalid_guidance_is_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_a_config_is_the_same_after_json():
    guidance = Guidance(
        scales={"text": (3.0, 2.0)},
        interval=(0.2, 0.9),
        rescale=0.5,
        method=AdaptiveProjectedGuidance(max_rms=0.06, momentum=-0.5),
    )
    assert config_json.from_json(config_json.to_json(guidance)) == guidance


@pytest.mark.parametrize(
    ("fields", "guidance"),
    [
        ({"scale": 3.0}, Guidance(scales={"text": 3.0})),
        ({"scale": (4.0, 3.0), "image_scale": 1.5}, Guidance(scales={"text": (4.0, 3.0), "image": 1.5})),
        (
            {"scale": 3.0, "projection": AdaptiveProjectedGuidance(momentum=0.5)},
            Guidance(scales={"text": 3.0}, method=AdaptiveProjectedGuidance(momentum=0.5)),
        ),
        ({"scale": 1.0, "zero_star": ZeroStarGuidance()}, Guidance(scales={"text": 1.0}, method=ZeroStarGuidance())),
    ],
)
def test_json_with_a_field_for_the_scale_of_the_prompt_is_read(fields, guidance):
    written = {"image_scale": None, "interval": [0.2, 0.9], "rescale": 0.5, "projection": None, "zero_star": None}
    written |= {name: config_json.to_json(value) for name, value in fields.items()}
    read = config_json.from_json({"type": "dit_video.diffusion:Guidance", **written, "skip_layers": None})
    assert read == replace(guidance, interval=(0.2, 0.9), rescale=0.5)


# CFG-Zero* and skip-layer guidance: identities, and options that do not fit


TIMES = np.linspace(1.0, 0.0, 11).astype(np.float32)
SKIP = SkipLayerGuidance(layers=(1,), scale=2.0, start=0.2, stop=0.6)


def guide_once(guidance, time, *, weaker=jnp.cos, branches=(conditional, unconditional)):
    """Return the guided prediction of NOISY."""
    denoise = apply_guidance(
        sequential(*map(stateless, branches[: guidance.branch_count])),
        guidance.get_params(TIMES),
        skipped=stateless(lambda noisy, time: weaker(noisy)),
    )
    return denoise(NOISY, jnp.asarray(time), None)[0]


def test_the_length_of_the_unconditional_prediction_does_not_matter_with_zero_star():
    guidance = Guidance(scales={"text": 3.0}, method=ZeroStarGuidance(zero_steps=0))
    expected = guide_once(guidance, 1.0)
    longer = guide_once(guidance, 1.0, branches=(conditional, lambda noisy, time: 7 * unconditional(noisy, time)))
    np.testing.assert_allclose(longer, expected, rtol=1e-4, atol=1e-4)
    assert np.abs(guide_once(Guidance(scales={"text": 3.0}), 1.0) - expected).max() > 0.1
    # A multiple of the conditional prediction is no guidance at all.
    parallel = guide_once(guidance, 1.0, branches=(conditional, lambda noisy, time: -0.3 * conditional(noisy, time)))
    np.testing.assert_allclose(parallel, conditional(NOISY, 1.0), rtol=1e-4, atol=1e-4)
    zero = guide_once(guidance, 1.0, branches=(conditional, lambda noisy, time: 0 * noisy))
    np.testing.assert_allclose(zero, 3 * conditional(NOISY, 1.0), rtol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_first_steps_of_zero_star_change_nothing(scale):
    guidance = Guidance(scales={"text": scale}, method=ZeroStarGuidance(zero_steps=2))
    results = [np.abs(guide_once(guidance, time)).max() for time in TIMES[:4]]
    assert [result == 0 for result in results] == [True, True, False, False]


def test_equal_predictions_without_layers_change_nothing():
    guidance = Guidance(scales={"text": 3.0}, skip_layers=SKIP)
    result = guide_once(guidance, TIMES[4], weaker=lambda noisy: conditional(noisy, TIMES[4]))
    np.testing.assert_allclose(result, guide_once(Guidance(scales={"text": 3.0}), TIMES[4]), rtol=1e-5, atol=1e-6)


def test_skip_layer_guidance_needs_no_unconditional_branch_and_has_its_own_steps():
    guidance = Guidance(scales={"text": 1.0}, skip_layers=SKIP)
    assert (guidance.branch_count, Guidance(scales={"text": 1.0}).get_params(TIMES)) == (1, None)
    for step, time in enumerate(TIMES[:-1]):
        c = conditional(NOISY, time)
        expected = c + 2.0 * (c - jnp.cos(NOISY)) if 2 < step < 6 else c
        np.testing.assert_allclose(guide_once(guidance, time), expected, rtol=1e-5, atol=1e-5, err_msg=str(step))
    few = SkipLayerGuidance(layers=(1,)).get_params(np.asarray([1.0, 0.5, 0.0]))
    assert few.interval[0] > few.interval[1]  # no step lies between 1 % and 20 % of two steps


def test_guidance_outside_of_its_interval_is_still_led_away_from_the_model_without_layers():
    guidance = Guidance(scales={"text": 3.0}, interval=(0.0, 0.1), skip_layers=SKIP)
    c = conditional(NOISY, TIMES[4])
    np.testing.assert_allclose(guide_once(guidance, TIMES[4]), c + 2.0 * (c - jnp.cos(NOISY)), rtol=1e-5, atol=1e-5)


def test_guidance_with_all_options_survives_json():
    guidance = Guidance(scales={"text": 3.0}, method=ZeroStarGuidance(zero_steps=2), skip_layers=SKIP)
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
        (
            lambda: Guidance(scales={"text": 2.0, "image": 2.0}, method=ZeroStarGuidance()),
            r"method=ZeroStarGuidance\(\) is invalid with scales of several conditions: .* Use one scale",
        ),
        (
            lambda: apply_guidance(
                sequential(stateless(conditional), stateless(unconditional)),
                Guidance(method=ZeroStarGuidance()).get_params(TIMES),
                prediction=Epsilon(),
            ),
            "invalid for Epsilon: .* Use another method",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()
