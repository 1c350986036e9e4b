"""Every scheduler of diffusers that is read here: its times, and its steps on one model, one after the other.

The noise that its stochastic steps draw is handed over, and the products of (1 - beta) in float64: of float32's the
least sigma has three figures. `EulerDiscreteScheduler` and its like carry x / alpha in float32, which of the cosine
schedule loses as many, so that they are not compared on it.
"""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_video.diffusion import Interval, estimator
from dit_video.weights import load_scheduler

pytestmark = pytest.mark.parity

NOISE = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
STABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
SCALED = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler")
"""those that carry x / alpha"""
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


def model(torch, x, time):
    return torch.sin(x) / 2 + time * x


def ours(x, time):
    return jnp.sin(x) / 2 + time * x


def of_diffusers(scheduler, steps, monkeypatch):
    """The samples after each step, in the process's own scale, and the noise of each."""
    import torch

    module = importlib.import_module(type(scheduler).__module__)
    drawn = []

    def handed_over(shape, **_):
        drawn.append(np.random.default_rng(100 + len(drawn)).normal(size=tuple(shape)).astype(np.float32))
        return torch.from_numpy(drawn[-1])

    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", handed_over)
    if not getattr(scheduler.config, "use_flow_sigmas", False):
        betas = scheduler.betas.to(torch.float64)
        scheduler.alphas_cumprod = torch.cumprod(1 - betas, dim=0)
    scheduler.set_timesteps(steps)
    scaled = type(scheduler).__name__ in SCALED
    trained = scheduler.config.num_train_timesteps
    x, found, noises = torch.from_numpy(NOISE.copy()), [], []
    if scaled:
        x = x * (scheduler.sigmas[0] ** 2 + 1) ** 0.5
    for index, timestep in enumerate(scheduler.timesteps):
        given = scheduler.scale_model_input(x, timestep) if scaled else x
        before = len(drawn)
        x = scheduler.step(model(torch, given, timestep / trained), timestep, x).prev_sample
        noises.append(drawn[-1] if len(drawn) > before else np.zeros_like(NOISE))
        following = scheduler.sigmas[index + 1] if scaled else 0.0
        found.append((x / (1 + following**2) ** 0.5).numpy())
    return found, noises


def compare(folder, scheduler, steps, monkeypatch):
    scheduler.save_config(folder)
    theirs, noises = of_diffusers(scheduler, steps, monkeypatch)
    found = load_scheduler(folder)
    grid = found.grid(found.process, steps)
    told = np.asarray(grid.told[:-1]) * scheduler.config.num_train_timesteps
    timesteps = scheduler.timesteps.numpy()
    heun = type(scheduler).__name__ == "HeunDiscreteScheduler"
    np.testing.assert_allclose(told, timesteps[np.r_[0, 1 : len(timesteps) : 2]] if heun else timesteps, atol=2e-3)

    def denoise(x, time):
        return ours(x, grid.told[jnp.argmin(jnp.abs(grid.times - time))])

    step = jax.jit(
        lambda state, time, following, noise: found.solver.step(
            estimator(denoise, found.process, found.prediction), found.process, state, Interval(time, following, noise)
        )
    )
    state = found.solver.init(jnp.asarray(NOISE), steps=steps)
    for index in range(steps):
        state = step(state, grid.times[index], grid.times[index + 1], noises[index])
        # Heun's has two steps of one each, but for the last.
        there = theirs[min(2 * index + 1, len(theirs) - 1) if heun else index]
        np.testing.assert_allclose(np.asarray(state.x), there, rtol=1e-4, atol=1e-4 * np.abs(there).max())


@pytest.fixture(scope="module")
def diffusers():
    pytest.importorskip("torch")
    return pytest.importorskip("diffusers")


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    ("name", "changes"),
    [
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
        ("DPMSolverMultistepScheduler", {}),
        ("DPMSolverMultistepScheduler", {"solver_type": "heun", "timestep_spacing": "trailing"}),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True, "timestep_spacing": "leading"}),
        ("DPMSolverMultistepScheduler", {"solver_order": 1}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"}),
        ("DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min", "lower_order_final": False}),
        ("DPMSolverSinglestepScheduler", {}),
        ("DPMSolverSinglestepScheduler", {"use_karras_sigmas": True, "solver_type": "heun"}),
        ("UniPCMultistepScheduler", {}),
        ("UniPCMultistepScheduler", {"use_karras_sigmas": True, "solver_order": 3}),
        ("UniPCMultistepScheduler", {"timestep_spacing": "trailing"}),
        ("LCMScheduler", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_steps_of_a_ddpm(diffusers, tmp_path, monkeypatch, name, changes, prediction):
    if prediction == "epsilon":
        betas, steps = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}, 10
    else:
        betas, steps = STABLE if name in SCALED or "use_karras_sigmas" in changes else COSINE, 7
    scheduler = getattr(diffusers, name)(**betas, **changes, prediction_type=prediction)
    compare(tmp_path, scheduler, steps, monkeypatch)


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
def test_steps_of_a_flow(diffusers, tmp_path, monkeypatch, name, changes, steps):
    compare(tmp_path, getattr(diffusers, name)(**FLOW, **changes), steps, monkeypatch)
