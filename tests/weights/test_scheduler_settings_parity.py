"""Schedulers of published folders, and each of their settings, equal diffusers' step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_video.diffusion import ClipSize, LinearQuadraticTimes, RectifiedFlow, UniformTimes
from dit_video.weights import load_scheduler
from support.published_schedulers import PUBLISHED
from support.scheduler_parity import compare, compute_mu, make_models, make_scheduler, make_steep_model, make_tame_model

pytestmark = pytest.mark.parity

SIZE = ClipSize(frames=5, frame_tokens=600)
STABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
ZERO_SNR = {**STABLE, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
ROUNDED = (
    "stable-diffusion-1.5",
    "zero-snr",
    "cogvideox-2b",
    "cogvideox-5b",
    "stable-video-diffusion",
    "ltx-video-0.9",
    "deepfloyd-if",
)
"""Schedulers whose steps are the most sensitive to rounding, or that have no others like them."""
THRESHOLD = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5}
SETTINGS = [
    ("DDIMScheduler", {"clip_sample": True, "clip_sample_range": 0.8}),
    ("DDIMScheduler", {**THRESHOLD, "prediction_type": "sample"}),
    ("DDPMScheduler", {**THRESHOLD, "variance_type": "fixed_large"}),
    ("DDPMScheduler", {**ZERO_SNR, "clip_sample": False, "timestep_spacing": "trailing"}),
    ("HeunDiscreteScheduler", {"clip_sample": True}),
    ("HeunDiscreteScheduler", {"use_beta_sigmas": True}),
    ("LCMScheduler", {"clip_sample": True, "clip_sample_range": 2.0}),
    ("LCMScheduler", THRESHOLD),
    ("EulerDiscreteScheduler", ZERO_SNR),
    ("EulerDiscreteScheduler", {**ZERO_SNR, "use_karras_sigmas": True}),
    ("EulerDiscreteScheduler", {"use_beta_sigmas": True}),
    ("EulerAncestralDiscreteScheduler", {**ZERO_SNR, "timestep_spacing": "trailing"}),
    ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}),
    ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True, "beta_schedule": "squaredcos_cap_v2"}),
    ("DPMSolverMultistepScheduler", {"use_beta_sigmas": True, "euler_at_final": True}),
    ("DPMSolverMultistepScheduler", {**ZERO_SNR, "timestep_spacing": "trailing"}),
    ("DPMSolverMultistepScheduler", {**THRESHOLD, "algorithm_type": "sde-dpmsolver++"}),
    ("DPMSolverSinglestepScheduler", {"use_beta_sigmas": True}),
    ("UniPCMultistepScheduler", {**ZERO_SNR, "timestep_spacing": "trailing"}),
    ("UniPCMultistepScheduler", {"use_beta_sigmas": True, **THRESHOLD}),
    ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "shift_terminal": 0.1}),
    ("PNDMScheduler", {"skip_prk_steps": True, "prediction_type": "v_prediction", "set_alpha_to_one": True}),
    ("PNDMScheduler", {"skip_prk_steps": True, "timestep_spacing": "trailing"}),
    ("PNDMScheduler", {"skip_prk_steps": False}),
    ("PNDMScheduler", {"skip_prk_steps": False, "prediction_type": "v_prediction", "steps_offset": 1}),
    ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True, "time_shift_type": "linear"}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "stochastic_sampling": True}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "shift_terminal": 0.1, "use_karras_sigmas": True}),
    ("FlowMatchEulerDiscreteScheduler", {"use_exponential_sigmas": True}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 5.0, "use_beta_sigmas": True}),
]


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def diffusers(torch):
    return pytest.importorskip("diffusers")


@pytest.mark.parametrize("name", PUBLISHED)
def test_steps_of_a_published_scheduler_equal_diffusers(diffusers, torch, tmp_path, monkeypatch, name):
    settings = dict(PUBLISHED[name])
    scheduler = make_scheduler(diffusers, settings.pop("_class_name"), monkeypatch, **settings)
    with jax.enable_x64(True):
        compare(tmp_path, scheduler, make_models(torch, make_steep_model, settings), 10, size=SIZE)


@pytest.mark.parametrize("name", ROUNDED)
def test_steps_of_a_published_scheduler_equal_diffusers_in_float32(diffusers, torch, tmp_path, monkeypatch, name):
    settings = dict(PUBLISHED[name])
    scheduler = make_scheduler(diffusers, settings.pop("_class_name"), monkeypatch, **settings)
    models = make_models(torch, make_tame_model, settings)
    compare(tmp_path, scheduler, models, 10, tolerance=1e-4, size=SIZE)


def named(value):
    return value if isinstance(value, str) else "-".join(f"{name}={setting}" for name, setting in value.items())


@pytest.mark.parametrize(("name", "settings"), SETTINGS, ids=named)
def test_steps_with_a_setting_equal_diffusers(diffusers, torch, tmp_path, monkeypatch, name, settings):
    scheduler = make_scheduler(diffusers, name, monkeypatch, **settings)
    with jax.enable_x64(True):
        compare(tmp_path, scheduler, (make_steep_model(torch.sin), make_steep_model(jnp.sin)), 8, size=SIZE)


@pytest.mark.parametrize(("name", "settings"), SETTINGS, ids=named)
def test_steps_with_a_setting_equal_diffusers_in_float32(diffusers, torch, tmp_path, monkeypatch, name, settings):
    if settings.get("beta_schedule") == "squaredcos_cap_v2":
        # Cosine betas begin at a ratio of noise to data of 2e4, by which the data that follow from this model's noise
        # are too large: diffusers in float32 differs from itself in float64 by 4e-3. Those of v are as large as v.
        settings = settings | {"prediction_type": "v_prediction"}
    scheduler = make_scheduler(diffusers, name, monkeypatch, **settings)
    models = make_tame_model(torch.sin), make_tame_model(jnp.sin)
    compare(tmp_path, scheduler, models, 8, tolerance=1e-4, size=SIZE)


@pytest.mark.parametrize("steps", [7, 30])
def test_midpoints_between_noise_steps_are_rounded_as_in_diffusers(diffusers, torch, tmp_path, monkeypatch, steps):
    scheduler = make_scheduler(diffusers, "PNDMScheduler", monkeypatch, **STABLE, steps_offset=1)
    with jax.enable_x64(True):
        compare(tmp_path, scheduler, (make_steep_model(torch.sin), make_steep_model(jnp.sin)), steps)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *((name, {}) for name in ("ltx-video-0.9", "flux-dev", "qwen-image")),
        *(("ltx-video-0.9", {f"use_{spacing}_sigmas": True}) for spacing in ("karras", "exponential", "beta")),
    ],
    ids=named,
)
def test_uniform_times_are_those_that_pipelines_pass_to_the_scheduler(diffusers, tmp_path, name, changes):
    """The pipelines of these models pass `linspace(1, 1 / steps, steps)`."""
    settings = {key: value for key, value in PUBLISHED[name].items() if key != "_class_name"} | changes
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**settings)
    scheduler.save_config(tmp_path)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 12, 12), mu=compute_mu(scheduler.config, SIZE))
    loaded = load_scheduler(tmp_path)
    grid = UniformTimes(terminal_time=loaded.time_schedule.terminal_time, spacing=loaded.time_schedule.spacing)
    assert_times_equal(grid(loaded.process.specialize(SIZE), 12), scheduler)


def test_shifted_linear_quadratic_times_are_those_that_the_scheduler_makes_of_them(diffusers):
    from diffusers.pipelines.ltx.pipeline_ltx_condition import linear_quadratic_schedule

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=linear_quadratic_schedule(12))
    assert_times_equal(LinearQuadraticTimes()(RectifiedFlow(shift=3.0), 12), scheduler)


def assert_times_equal(times, scheduler):
    np.testing.assert_allclose(times.times, scheduler.sigmas.numpy(), atol=1e-6)
    np.testing.assert_allclose(times.model_times[:-1] * 1000, scheduler.timesteps.numpy(), rtol=1e-6)
