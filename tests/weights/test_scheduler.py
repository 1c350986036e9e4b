"""Schedulers of folders; the parity tests at the end compare their steps with diffusers."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_video.core.config_json import from_json, to_json
from dit_video.core.errors import MissingError, UserError
from dit_video.diffusion import (
    X0,
    ClippedPrediction,
    ClipSize,
    Ddim,
    Ddpm,
    DiscreteSchedule,
    DpmFlowSchedule,
    DpmMultistep,
    Edm,
    Epsilon,
    Euler,
    ExponentialShift,
    FlowMatchSchedule,
    Heun,
    KarrasTimes,
    Lcm,
    LcmSchedule,
    LearnedVariance,
    LinearShift,
    RectifiedFlow,
    ScaledLinearBetas,
    StepInterval,
    ThresholdedPrediction,
    UniPc,
    UniPcFlowSchedule,
    V,
    VariancePreservingProcess,
    Velocity,
    make_estimator,
    stateless,
)
from dit_video.sampling import Sampling
from dit_video.weights import LoadedScheduler, load_scheduler
from support.published_schedulers import PUBLISHED

# The scheduler of Wan 2.1, without settings at their defaults.
WAN = {
    "_class_name": "UniPCMultistepScheduler",
    "_diffusers_version": "0.33.0",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
}


def load(folder, document):
    (folder / "scheduler_config.json").write_text(json.dumps(document))
    return load_scheduler(folder)


def test_wans_scheduler_is_read(tmp_path):
    assert load(tmp_path, WAN) == LoadedScheduler(UniPc(), RectifiedFlow(shift=3.0), UniPcFlowSchedule())
    changed = WAN | {"solver_order": 3, "solver_type": "bh1", "lower_order_final": False, "disable_corrector": [0, 1]}
    assert load(tmp_path, changed).solver == UniPc(
        order=3, kind="bh1", lower_order_final=False, uncorrected_steps=(0, 1)
    )


def test_the_flow_matching_scheduler_is_read(tmp_path):
    result = load(tmp_path, {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 5})
    assert result == LoadedScheduler(Euler(), RectifiedFlow(shift=5.0), FlowMatchSchedule())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"_class_name": "UnCLIPScheduler"},
            "UnCLIPScheduler. Supported classes are UniPCMultistepScheduler, FlowMatchEuler",
        ),
        (
            {"use_dynamic_shifting": True},
            "use_dynamic_shifting=True. Supported: False or None. For a shift by size use Fl",
        ),
        ({"shift_terminal": 1.5}, "terminal_time=1.5 is invalid"),
        ({"warp": 2}, "sets warp. Supported settings of UniPCMultistepScheduler are num_train_timesteps, beta_start"),
        ({"prediction_type": "epsilon"}, "prediction_type='epsilon'. Supported: 'flow_prediction'"),
        ({"use_flow_sigmas": False}, "prediction_type='flow_prediction'. Supported: 'epsilon' or 'sample' or 'v_p"),
        ({"use_karras_sigmas": True}, "use_karras_sigmas=True"),
        ({"solver_order": 4}, "solver_order=4. Supported: 1 or 2 or 3"),
        ({"final_sigmas_type": "sigma_min"}, "final_sigmas_type='sigma_min'"),
        ({"predict_x0": False}, "predict_x0=False"),
        ({"flow_shift": "wide"}, "flow_shift='wide'. Use a positive number"),
        ({"flow_shift": 0}, "flow_shift=0. Use a positive number"),
    ],
)
def test_unsupported_settings_are_refused(tmp_path, changes, words):
    with pytest.raises(UserError) as caught:
        load(tmp_path, WAN | changes)
    assert words in str(caught.value)


def test_absent_settings_have_the_defaults_of_diffusers(tmp_path):
    with pytest.raises(UserError, match="prediction_type='epsilon'"):  # the default of diffusers, which no flow has
        load(tmp_path, {name: value for name, value in WAN.items() if name != "prediction_type"})


# Settings of Stable Diffusion, some of which belong to another scheduler.
STABLE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "num_train_timesteps": 1000,
}


@pytest.mark.parametrize(
    ("document", "solver", "grid", "prediction"),
    [
        (
            {"_class_name": "DDIMScheduler"},
            Ddim(),
            {"spacing": "leading", "step_rounding": "nearest", "end": "first step"},
            Epsilon(),
        ),
        (
            {"_class_name": "DDPMScheduler", "variance_type": "learned_range", "prediction_type": "v_prediction"},
            Ddpm(),
            {"spacing": "leading", "step_rounding": "nearest"},
            LearnedVariance(prediction=V()),
        ),
        ({"_class_name": "EulerDiscreteScheduler"}, Euler(), {"spacing": "linspace"}, Epsilon()),
        ({"_class_name": "EulerAncestralDiscreteScheduler"}, Ddim(eta=1.0), {"spacing": "linspace"}, Epsilon()),
        ({"_class_name": "HeunDiscreteScheduler"}, Heun(), {"spacing": "linspace"}, Epsilon()),
        (
            {
                "_class_name": "DPMSolverMultistepScheduler",
                "algorithm_type": "sde-dpmsolver++",
                "use_karras_sigmas": True,
            },
            DpmMultistep(eta=1.0),
            {"spacing": "linspace", "step_rounding": "nearest", "has_extra_step": True, "ratio_spacing": "karras"},
            Epsilon(),
        ),
        (
            {"_class_name": "UniPCMultistepScheduler", "prediction_type": "sample"},
            UniPc(),
            {"spacing": "linspace", "step_rounding": "nearest", "has_extra_step": True},
            X0(),
        ),
    ],
    ids=lambda value: value["_class_name"] if isinstance(value, dict) and "_class_name" in value else "",
)
def test_schedulers_of_a_ddpm_are_read(tmp_path, document, solver, grid, prediction):
    process = VariancePreservingProcess(betas=ScaledLinearBetas())
    expected = LoadedScheduler(solver, process, DiscreteSchedule(steps_offset=1, **grid), prediction)
    assert load(tmp_path, STABLE | document) == expected


def test_the_scheduler_of_a_latent_consistency_model_is_read(tmp_path):
    result = load(tmp_path, {"_class_name": "LCMScheduler", "original_inference_steps": 25})
    assert result == LoadedScheduler(
        Lcm(), VariancePreservingProcess(betas=ScaledLinearBetas()), LcmSchedule(distillation_steps=25), Epsilon()
    )


def test_dpm_solver_for_a_flow_is_read(tmp_path):
    result = load(tmp_path, WAN | {"_class_name": "DPMSolverMultistepScheduler", "solver_type": "heun"})
    assert result == LoadedScheduler(DpmMultistep(kind="heun"), RectifiedFlow(shift=3.0), DpmFlowSchedule())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_schedulers_are_read(tmp_path, name):
    result = load(tmp_path, PUBLISHED[name])
    assert from_json(to_json(Sampling(solver=result.solver, time_schedule=result.time_schedule)))
    times = result.time_schedule(result.process.specialize(ClipSize(5, 600)), 10)
    assert times.times.shape == (11,)
    assert (np.diff(times.times) < 0).all()


def test_clipping_and_thresholding_are_predictions(tmp_path):
    ddpm = {"_class_name": "DDPMScheduler", "variance_type": "learned_range"}
    clipped = ClippedPrediction(max_value=1.5)
    assert load(tmp_path, ddpm | {"clip_sample_range": 1.5}).prediction == LearnedVariance(prediction=clipped)
    heun = load(tmp_path, {"_class_name": "HeunDiscreteScheduler", "clip_sample": True})
    assert heun.prediction == ClippedPrediction(recompute_noise=True)
    settings = {"thresholding": True, "dynamic_thresholding_ratio": 0.95, "sample_max_value": 1.5}
    thresholded = ThresholdedPrediction(prediction=V(), quantile=0.95, max_threshold=1.5)
    for kind in ("DDIMScheduler", "LCMScheduler", "UniPCMultistepScheduler", "DPMSolverMultistepScheduler"):
        document = {"_class_name": kind, "prediction_type": "v_prediction", **settings}
        assert load(tmp_path, document).prediction == thresholded


def test_settings_that_a_scheduler_does_not_read_are_ignored(tmp_path):
    euler = {"_class_name": "EulerDiscreteScheduler"}
    assert load(tmp_path, euler | {"clip_sample": True, "thresholding": True}) == load(tmp_path, euler)


def test_a_shift_by_size_is_that_of_the_tokens_of_a_clip(tmp_path):
    flux = load(tmp_path, PUBLISHED["flux-dev"])
    assert flux.process == RectifiedFlow(size_shift=ExponentialShift(tokens=(256, 4096), mu=(0.5, 1.15)))
    assert flux.time_schedule == FlowMatchSchedule(is_end_shifted_twice=False)
    linear = load(tmp_path, PUBLISHED["flux-dev"] | {"time_shift_type": "linear"})
    assert linear.process.size_shift == LinearShift(tokens=(256, 4096), shifts=(0.5, 1.15), per="clip")


def test_continuous_sigmas_are_a_process_that_adds_noise(tmp_path):
    result = load(tmp_path, PUBLISHED["stable-video-diffusion"])
    times = KarrasTimes(min_ratio=0.002, max_ratio=700.0, log_ratio_scale=0.25 / 1000)
    assert result == LoadedScheduler(Euler(), Edm(sigma_max=700.0, data_std=1.0), times, V())


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (
            {"_class_name": "EulerDiscreteScheduler", "sigma_max": 80.0},
            r"sigma_max=80\.0.* Use both sigmas with timestep",
        ),
        (
            {**PUBLISHED["stable-video-diffusion"], "use_karras_sigmas": False},
            r"is not supported\. Use .*use_karras_sigmas",
        ),
        ({"_class_name": "EulerDiscreteScheduler", "rescale_betas_zero_snr": True}, r"Use the prediction_type that"),
        (
            {"_class_name": "HeunDiscreteScheduler", "use_karras_sigmas": True, "use_beta_sigmas": True},
            r"use_karras_sigmas and use_beta_sigmas are exclusive\. Use one",
        ),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "euler_at_final": True, "final_sigmas_type": "sigma_min"},
            r"euler_at_final=True is not supported .* Use 'zero'",
        ),
        ({"_class_name": "UniPCMultistepScheduler", "shift_terminal": 0.1}, r"Use shift_terminal=None"),
        ({"_class_name": "DDIMScheduler", "timestep_spacing": "linspace"}, r"Supported: 'leading' or 'trailing'"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused_with_the_file(tmp_path, document, message):
    with pytest.raises(UserError, match=rf"scheduler_config\.json: .*{message}"):
        load(tmp_path, document)


def test_a_missing_scheduler_is_refused(tmp_path):
    with pytest.raises(MissingError, match="no such file"):
        load_scheduler(tmp_path)


# --- against diffusers ----------------------------------------------------------------------------------------------

STEPS, SHIFTS = (4, 10, 25), (1.0, 3.0, 5.0)
NOISE = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)


def compare(folder, scheduler, steps):
    """Compare both step for step on a toy denoiser. (The last step of `bh1` in diffusers is NaN, infinity times 0.)"""
    import torch

    scheduler.set_timesteps(steps)
    scheduler.save_config(folder)
    result = load_scheduler(folder)
    grid = result.time_schedule(result.process, steps)
    np.testing.assert_allclose(np.asarray(grid.times), scheduler.sigmas.numpy(), atol=1e-7)
    model_times = np.asarray(grid.model_times[:-1]) * scheduler.config.num_train_timesteps
    np.testing.assert_allclose(model_times, scheduler.timesteps.numpy(), rtol=2e-7)

    step = jax.jit(
        lambda state, time, following: result.solver.step(
            make_estimator(stateless(lambda x, t: jnp.sin(3 * x) + t * x), result.process, Velocity()),
            result.process,
            state,
            StepInterval(time, following),
        )
    )
    ours, theirs = result.solver.init(jnp.asarray(NOISE), steps=steps), torch.from_numpy(NOISE.copy())
    for index, timestep in enumerate(scheduler.timesteps):
        prediction = torch.sin(3 * theirs) + scheduler.sigmas[index] * theirs
        theirs = scheduler.step(prediction, timestep, theirs).prev_sample
        ours = step(ours, grid.times[index], grid.times[index + 1])
        if getattr(result.solver, "kind", "") == "bh1" and index == steps - 1:
            assert theirs.isnan().all()
            assert jnp.isfinite(ours.x).all()
        else:
            np.testing.assert_allclose(np.asarray(ours.x), theirs.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_equals_diffusers_step_for_step(tmp_path, order, kind):
    diffusers = pytest.importorskip("diffusers")
    for steps, shift in itertools.product(STEPS, SHIFTS):
        scheduler = diffusers.UniPCMultistepScheduler(
            solver_order=order,
            solver_type=kind,
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=shift,
            disable_corrector=[2] if steps == 10 else [],
        )
        compare(tmp_path, scheduler, steps)


@pytest.mark.parity
def test_flow_matching_equals_diffusers_step_for_step(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    for steps, shift in itertools.product(STEPS, SHIFTS):
        compare(tmp_path, diffusers.FlowMatchEulerDiscreteScheduler(shift=shift), steps)
