"""Times and steps of every supported scheduler of diffusers, on one model."""

import jax
import jax.numpy as jnp
import pytest

from dit_video.diffusion import Ddim, LearnedVariance
from dit_video.weights import load_scheduler
from support.scheduler_parity import compare, make_models, make_scheduler, make_steep_model, make_tame_model

pytestmark = pytest.mark.parity

LINEAR = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
STABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
ROUNDING = ("DPMSolverSinglestepScheduler", "UniPCMultistepScheduler")
"""Schedulers that round the timesteps of Karras' sigmas; with cosine betas several coincide, and their steps fail."""
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def diffusers(torch):
    return pytest.importorskip("diffusers")


DDPMS = [
    ("DDIMScheduler", {"clip_sample": False}),
    ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
    ("DDIMScheduler", {"clip_sample": False, "timestep_spacing": "trailing", "num_train_timesteps": 70}),
    ("DDPMScheduler", {"clip_sample": False}),
    ("DDPMScheduler", {"clip_sample": False, "timestep_spacing": "trailing"}),
    ("DDPMScheduler", {"clip_sample": False, "timestep_spacing": "linspace"}),
    ("DDPMScheduler", {"clip_sample": False, "variance_type": "fixed_large"}),
    ("DDPMScheduler", {"clip_sample": False, "variance_type": "fixed_small_log"}),
    ("EulerDiscreteScheduler", {}),
    ("EulerDiscreteScheduler", {"timestep_spacing": "leading", "steps_offset": 1}),
    ("EulerDiscreteScheduler", {"timestep_spacing": "trailing", "final_sigmas_type": "sigma_min"}),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    ("EulerDiscreteScheduler", {"use_exponential_sigmas": True}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing"}),
    ("HeunDiscreteScheduler", {}),
    ("HeunDiscreteScheduler", {"use_karras_sigmas": True}),
    ("HeunDiscreteScheduler", {"use_exponential_sigmas": True}),
    ("DPMSolverMultistepScheduler", {}),
    ("DPMSolverMultistepScheduler", {"solver_type": "heun", "timestep_spacing": "trailing"}),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True, "timestep_spacing": "leading"}),
    ("DPMSolverMultistepScheduler", {"use_exponential_sigmas": True}),
    ("DPMSolverMultistepScheduler", {"solver_order": 1}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"}),
    ("DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min", "lower_order_final": False}),
    ("DPMSolverSinglestepScheduler", {}),
    ("DPMSolverSinglestepScheduler", {"use_karras_sigmas": True, "solver_type": "heun"}),
    ("DPMSolverSinglestepScheduler", {"use_exponential_sigmas": True}),
    ("UniPCMultistepScheduler", {}),
    ("UniPCMultistepScheduler", {"use_karras_sigmas": True, "solver_order": 3}),
    ("UniPCMultistepScheduler", {"use_exponential_sigmas": True}),
    ("UniPCMultistepScheduler", {"timestep_spacing": "trailing"}),
    ("LCMScheduler", {}),
]


def named(value):
    return value if isinstance(value, str) else "-".join(map(str, value.values()))


@pytest.mark.parametrize(("betas", "prediction", "steps"), [(LINEAR, "epsilon", 10), (COSINE, "v_prediction", 7)])
@pytest.mark.parametrize(("name", "changes"), DDPMS, ids=named)
def test_steps_of_a_ddpm_equal_diffusers(
    diffusers, torch, tmp_path, monkeypatch, name, changes, betas, prediction, steps
):
    betas = STABLE if betas == COSINE and name in ROUNDING and "use_karras_sigmas" in changes else betas
    scheduler = make_scheduler(diffusers, name, monkeypatch, **betas, **changes, prediction_type=prediction)
    with jax.enable_x64(True):
        compare(tmp_path, scheduler, (make_steep_model(torch.sin), make_steep_model(jnp.sin)), steps)


@pytest.mark.parametrize(("name", "changes"), dict(DDPMS[::-1]).items(), ids=named)
def test_steps_of_a_ddpm_equal_diffusers_in_float32(diffusers, torch, tmp_path, monkeypatch, name, changes):
    scheduler = make_scheduler(diffusers, name, monkeypatch, **LINEAR, **changes)
    compare(tmp_path, scheduler, (make_tame_model(torch.sin), make_tame_model(jnp.sin)), 10, tolerance=1e-4)


@pytest.mark.parametrize("eta", [0.4, 1.0])
@pytest.mark.parametrize("changes", [{}, {"set_alpha_to_one": False, "timestep_spacing": "trailing"}], ids=named)
def test_ddim_with_noise_equals_diffusers(diffusers, torch, tmp_path, monkeypatch, changes, eta):
    scheduler = make_scheduler(diffusers, "DDIMScheduler", monkeypatch, **COSINE, **changes, clip_sample=False)
    with jax.enable_x64(True):
        models = make_steep_model(torch.sin), make_steep_model(jnp.sin)
        compare(tmp_path, scheduler, models, 8, solver=Ddim(eta=eta), eta=eta)


@pytest.mark.parametrize("betas", [LINEAR, COSINE], ids=["linear", "cosine"])
@pytest.mark.parametrize("spacing", ["leading", "linspace"])
def test_steps_with_a_learned_variance_equal_diffusers(diffusers, torch, tmp_path, monkeypatch, betas, spacing):
    settings = {"variance_type": "learned_range", "timestep_spacing": spacing, "prediction_type": "v_prediction"}
    scheduler = make_scheduler(diffusers, "DDPMScheduler", monkeypatch, **betas, **settings, clip_sample=False)
    with jax.enable_x64(True):
        compare(tmp_path, scheduler, make_models(torch, make_steep_model, settings), 10)
    assert isinstance(load_scheduler(tmp_path).prediction, LearnedVariance)


@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("DPMSolverMultistepScheduler", {"flow_shift": 3.0}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        ("DPMSolverSinglestepScheduler", {"flow_shift": 5.0}),
        ("UniPCMultistepScheduler", {"flow_shift": 5.0}),
    ],
    ids=["multistep", "sde", "singlestep", "unipc"],
)
def test_steps_of_a_flow_equal_diffusers(diffusers, torch, tmp_path, monkeypatch, name, changes, steps):
    scheduler = make_scheduler(diffusers, name, monkeypatch, **FLOW, **changes)
    with jax.enable_x64(True):
        compare(tmp_path, scheduler, (make_steep_model(torch.sin), make_steep_model(jnp.sin)), steps)
