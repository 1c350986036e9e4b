"""Times and steps of every supported scheduler of diffusers, on one model.

Both compute in float64, diffusers' schedulers by having their module's float32 be that. In float32 the model below,
which is as steep as `sin(3 x)`, amplifies rounding beyond any bound that would tell an error from it, and schedulers
which carry x / alpha (`EulerDiscreteScheduler` and its like) lose figures: of cosine betas it begins at 2e4. What
float32 gives is compared too, on a tamer model. The noise that stochastic steps draw is handed over.
"""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_video.diffusion import Ddim, LearnedVariance, StepInterval, make_estimator, stateless
from dit_video.weights import load_scheduler

pytestmark = pytest.mark.parity

NOISE = np.random.default_rng(0).normal(size=(2, 3, 4))
LINEAR = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
STABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
ROUNDING = ("DPMSolverSinglestepScheduler", "UniPCMultistepScheduler")
"""Schedulers that round the timesteps of Karras' sigmas; with cosine betas several coincide, and their steps fail."""
SCALED = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler")
"""Schedulers that carry x / alpha."""
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


class Double:
    """A module whose float32 is its float64."""

    def __init__(self, module):
        self._module = module

    def __getattr__(self, name):
        return getattr(self._module, "float64" if name == "float32" else name)


def make_scheduler(diffusers, name, monkeypatch, **settings):
    """Return a scheduler in float64, and the list of the random numbers that replace its own."""
    import torch

    kind = getattr(diffusers, name)
    module = importlib.import_module(kind.__module__)
    drawn = []

    def return_noise(shape, **_):
        drawn.append(np.random.default_rng(100 + len(drawn)).normal(size=tuple(shape)))
        return torch.from_numpy(drawn[-1])

    for attribute, value in (("torch", Double(torch)), ("np", Double(np)), ("randn_tensor", return_noise)):
        if hasattr(module, attribute):
            monkeypatch.setattr(module, attribute, value)
    return kind(**settings), drawn


def sample_with_diffusers(scheduler, drawn, model, steps, **options):
    """Return the samples of diffusers after each step, and their noise; `options` are arguments of `step`."""
    import torch

    scheduler.set_timesteps(steps)
    scaled = type(scheduler).__name__ in SCALED
    trained = scheduler.config.num_train_timesteps
    x, result, noises = torch.from_numpy(NOISE.copy()), [], []
    if scaled:
        x = x * (scheduler.sigmas[0] ** 2 + 1) ** 0.5
    for index, timestep in enumerate(scheduler.timesteps):
        scaled_x = scheduler.scale_model_input(x, timestep) if scaled else x
        before = len(drawn)
        x = scheduler.step(model(scaled_x, timestep.double() / trained), timestep, x, **options).prev_sample
        noises.append(drawn[-1] if len(drawn) > before else np.zeros_like(NOISE))
        following = scheduler.sigmas[index + 1] if scaled else 0.0
        result.append((x / (1 + following**2) ** 0.5).numpy())
    assert x.dtype == torch.float64
    return result, noises


def sample_with_ours(folder, model, steps, noises, *, solver=None):
    """Return our samples after each step, and the times that the model received."""
    result = load_scheduler(folder)
    solver, grid = solver or result.solver, result.time_schedule(result.process, steps)

    def denoise(x, time):
        return model(x, grid.model_times[jnp.argmin(jnp.abs(grid.times - time))])

    step = jax.jit(
        lambda state, time, following, noise: solver.step(
            make_estimator(stateless(denoise), result.process, result.prediction),
            result.process,
            state,
            StepInterval(time, following, noise),
        )
    )
    dtype = grid.times.dtype
    state, samples = solver.init(jnp.asarray(NOISE, dtype), steps=steps), []
    for index in range(steps):
        state = step(state, grid.times[index], grid.times[index + 1], jnp.asarray(noises[index], dtype))
        samples.append(np.asarray(state.x))
    return samples, np.asarray(grid.model_times[:-1])


def compare(folder, made, models, steps, *, tolerance=1e-6, solver=None, **options):
    scheduler, drawn = made
    scheduler.save_config(folder)
    theirs, noises = sample_with_diffusers(scheduler, drawn, models[0], steps, **options)
    timesteps = scheduler.timesteps.numpy()
    if type(scheduler).__name__ == "HeunDiscreteScheduler":  # each of its steps but the last counts twice
        theirs, timesteps = [*theirs[1::2], theirs[-1]], timesteps[np.r_[0, 1 : len(timesteps) : 2]]
    ours, model_times = sample_with_ours(folder, models[1], steps, noises, solver=solver)
    np.testing.assert_allclose(model_times * scheduler.config.num_train_timesteps, timesteps, atol=2e-3)
    for there, here in zip(theirs, ours, strict=True):
        np.testing.assert_allclose(here, there, rtol=tolerance, atol=tolerance * np.abs(there).max())


def steep(sine):
    """Return a steep model that uses the sine of a library."""
    return lambda x, time: sine(3 * x) / 2 + time * x


def tame(sine):
    return lambda x, time: sine(x) / 2 + time * x


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
        compare(tmp_path, scheduler, (steep(torch.sin), steep(jnp.sin)), steps)


@pytest.mark.parametrize(("name", "changes"), dict(DDPMS[::-1]).items(), ids=named)
def test_steps_of_a_ddpm_equal_diffusers_in_float32(diffusers, torch, tmp_path, monkeypatch, name, changes):
    scheduler = make_scheduler(diffusers, name, monkeypatch, **LINEAR, **changes)
    compare(tmp_path, scheduler, (tame(torch.sin), tame(jnp.sin)), 10, tolerance=1e-4)


@pytest.mark.parametrize("eta", [0.4, 1.0])
@pytest.mark.parametrize("changes", [{}, {"set_alpha_to_one": False, "timestep_spacing": "trailing"}], ids=named)
def test_ddim_with_noise_equals_diffusers(diffusers, torch, tmp_path, monkeypatch, changes, eta):
    scheduler = make_scheduler(diffusers, "DDIMScheduler", monkeypatch, **COSINE, **changes, clip_sample=False)
    with jax.enable_x64(True):
        models = steep(torch.sin), steep(jnp.sin)
        compare(tmp_path, scheduler, models, 8, solver=Ddim(eta=eta), eta=eta)


@pytest.mark.parametrize("betas", [LINEAR, COSINE], ids=["linear", "cosine"])
@pytest.mark.parametrize("spacing", ["leading", "linspace"])
def test_steps_with_a_learned_variance_equal_diffusers(diffusers, torch, tmp_path, monkeypatch, betas, spacing):
    """Channels are the second axis of diffusers and our last."""
    settings = {"variance_type": "learned_range", "timestep_spacing": spacing, "prediction_type": "v_prediction"}
    scheduler = make_scheduler(diffusers, "DDPMScheduler", monkeypatch, **betas, **settings, clip_sample=False)

    def theirs(x, time):
        return torch.cat([steep(torch.sin)(x, time), torch.cos(2 * x) - time], dim=1)

    def ours(x, time):
        return jnp.concatenate([steep(jnp.sin)(x, time), jnp.cos(2 * x) - time], axis=-1)

    with jax.enable_x64(True):
        compare(tmp_path, scheduler, (theirs, ours), 10)
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
        compare(tmp_path, scheduler, (steep(torch.sin), steep(jnp.sin)), steps)
