"""Comparison of a scheduler of diffusers with the one that is loaded from its config, step by step, on a toy model.

Both compute in float64, diffusers' schedulers by having their module's float32 be that. In float32 the steep model
below amplifies rounding beyond any bound that would tell an error from it, and schedulers which carry x / alpha
(`EulerDiscreteScheduler` and its like) lose figures: of cosine betas it begins at 2e4. What float32 gives is compared
too, on a tamer model. The noise that stochastic steps draw is handed over.
"""

import importlib

import jax
import jax.numpy as jnp
import numpy as np

from dit_video.diffusion import StepInterval, make_estimator, stateless
from dit_video.weights import load_scheduler

NOISE = np.random.default_rng(0).normal(size=(2, 3, 4))
SCALED = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler")
"""Schedulers that carry x / alpha."""


class Double:
    """A module whose float32 is its float64."""

    def __init__(self, module):
        self._module = module

    def __getattr__(self, name):
        return getattr(self._module, "float64" if name == "float32" else name)


def make_scheduler(diffusers, name, monkeypatch, **settings):
    """Return a scheduler in float64, and the list of the random numbers that replace its own.

    Settings that belong to another scheduler are kept in its config, as those of a converted folder.
    """
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
    return kind.from_config(settings), drawn


def compute_mu(config, size):
    """Return the parameter of dynamic shifting as diffusers' pipelines compute it from a clip's tokens."""
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    return size.frames * size.frame_tokens * slope + config.base_shift - slope * config.base_image_seq_len


def sample_with_diffusers(scheduler, drawn, model, steps, size, **options):
    """Return the samples of diffusers after each step, and their noise; `options` are arguments of `step`."""
    import torch

    is_shifted = size is not None and scheduler.config.get("use_dynamic_shifting")
    scheduler.set_timesteps(steps, **({"mu": compute_mu(scheduler.config, size)} if is_shifted else {}))
    scaled = type(scheduler).__name__ in SCALED
    has_continuous_sigmas = scheduler.config.get("timestep_type") == "continuous"
    trained = scheduler.config.num_train_timesteps
    x, result, noises = torch.from_numpy(NOISE.copy()), [], []
    if scaled:
        x = x * (scheduler.sigmas[0] if has_continuous_sigmas else (scheduler.sigmas[0] ** 2 + 1) ** 0.5)
    data = None
    for index, timestep in enumerate(scheduler.timesteps):
        scaled_x = scheduler.scale_model_input(x, timestep) if scaled else x
        before = len(drawn)
        prediction = model(scaled_x, timestep.double() / trained)
        if type(scheduler).__name__ == "CogVideoXDPMScheduler":
            last = scheduler.timesteps[index - 1] if index else None
            x, data = scheduler.step(prediction, data, timestep, last, x, **options)
        else:
            x = scheduler.step(prediction, timestep, x, **options).prev_sample
        noises.append(drawn[-1] if len(drawn) > before else np.zeros_like(NOISE))
        following = scheduler.sigmas[index + 1] if scaled and not has_continuous_sigmas else 0.0
        result.append((x / (1 + following**2) ** 0.5).numpy())
    assert x.dtype == torch.float64
    return result, noises


def sample_with_ours(folder, model, steps, noises, size, *, solver=None):
    """Return our samples after each step, and the times that the model received."""
    result = load_scheduler(folder)
    process = result.process if size is None else result.process.specialize(size)
    solver, grid = solver or result.solver, result.time_schedule(process, steps)

    def denoise(x, time):
        return model(x, jnp.interp(time, grid.times[::-1], grid.model_times[::-1]))

    step = jax.jit(
        lambda state, time, following, noise: solver.step(
            make_estimator(stateless(denoise), process, result.prediction),
            process,
            state,
            StepInterval(time, following, noise),
        )
    )
    dtype = grid.times.dtype
    state, samples = solver.init(process.scale_initial_noise(jnp.asarray(NOISE, dtype)), steps=steps), []
    for index in range(steps):
        state = step(state, grid.times[index], grid.times[index + 1], jnp.asarray(noises[index], dtype))
        samples.append(np.asarray(state.x))
    return samples, np.asarray(grid.model_times[:-1])


def compare(folder, made, models, steps, *, tolerance=1e-6, solver=None, size=None, **options):
    """Compare the samples after every step and the times that the models received.

    Args:
      folder: Empty folder, for the config.
      made: The scheduler and its random numbers, of `make_scheduler`.
      models: The model in PyTorch and in JAX.
      steps: Number of sampling steps.
      tolerance: Error relative to the largest value.
      solver: The solver instead of the loaded one.
      size: Size of the clip, for a shift that depends on it.
      options: Arguments of diffusers' `step`.
    """
    scheduler, drawn = made
    scheduler.save_config(folder)
    theirs, noises = sample_with_diffusers(scheduler, drawn, models[0], steps, size, **options)
    timesteps = scheduler.timesteps.numpy()
    if type(scheduler).__name__ == "HeunDiscreteScheduler":  # each of its steps but the last counts twice
        theirs, timesteps = [*theirs[1::2], theirs[-1]], timesteps[np.r_[0, 1 : len(timesteps) : 2]]
    elif type(scheduler).__name__ == "PNDMScheduler" and scheduler.config.skip_prk_steps:  # the first counts twice
        theirs, timesteps = theirs[1:], np.delete(timesteps, 1)
    elif type(scheduler).__name__ == "PNDMScheduler":  # the first three count four times
        theirs, timesteps = [*theirs[3:12:4], *theirs[12:]], np.r_[timesteps[:12:4], timesteps[12:]]
    ours, model_times = sample_with_ours(folder, models[1], steps, noises, size, solver=solver)
    np.testing.assert_allclose(model_times * scheduler.config.num_train_timesteps, timesteps, atol=2e-3)
    for there, here in zip(theirs, ours, strict=True):
        np.testing.assert_allclose(here, there, rtol=tolerance, atol=tolerance * np.abs(there).max())


def make_models(torch, make_model, settings):
    """Return a model in PyTorch and in JAX, with a variance if the scheduler expects one.

    Channels are the second axis of diffusers and our last.
    """
    theirs, ours = make_model(torch.sin), make_model(jnp.sin)
    if settings.get("variance_type") != "learned_range":
        return theirs, ours
    return (
        lambda x, time: torch.cat([theirs(x, time), torch.cos(2 * x) - time], dim=1),
        lambda x, time: jnp.concatenate([ours(x, time), jnp.cos(2 * x) - time], axis=-1),
    )


def make_steep_model(sine):
    """Return a steep model that uses the sine of a library."""
    return lambda x, time: sine(3 * x) / 2 + time * x


def make_tame_model(sine):
    return lambda x, time: sine(x) / 2 + time * x
