"""Inversion: from data to the noise that sampling would start from, by solving the probability flow towards noise.

For every process this is DDIM inversion (arXiv 2010.02502, section 4.3); for rectified flow it is the flow itself.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from dit_video.core.errors import UserError
from dit_video.diffusion.predictions import X0, DenoiseFn, Prediction, Velocity
from dit_video.diffusion.processes.process import Process
from dit_video.diffusion.samplers.ancestral import Ddim
from dit_video.diffusion.samplers.sampler import advance, init_sampling, sample
from dit_video.diffusion.samplers.solvers import Euler, Heun, Solver


class Inversion(NamedTuple):
    """Noise of inverted data, and how well it reconstructs them."""

    noise: Float[Array, "B *shape"]
    """Noise that `sample` starts from, standard normal if the model is exact."""
    data: Float[Array, "B *shape"]
    """Data sampled from that noise, with the same solver at the same times."""
    error: Float[Array, " B"]
    """Root mean square error of each sample's reconstruction."""


def invert(
    denoise: DenoiseFn,
    data: Float[Array, "B *shape"],
    times: Float[Array, " times"],
    *,
    process: Process,
    solver: Solver = Euler(),  # noqa: B008 (a value)
    prediction: Prediction = Velocity(),  # noqa: B008 (a value)
    model_times: Float[Array, " times"] | None = None,
) -> Inversion:
    """Return the noise of data, and the data sampled from that noise. Costs twice as much as sampling.

    The inverse step is not exact: it evaluates the model at its own start, the opposite end of the sampling step. The
    error falls with the number of steps at the order of the solver.

    Args:
      denoise: The model, without state and with little or no guidance: guidance has no invertible flow.
      data: The data to invert.
      times: Times that rise from 0 to 1, such as a reversed time schedule.
      process: The process that the model was trained on.
      solver: A deterministic one-step solver.
      prediction: The kind of the model's prediction.
      model_times: The time that the model receives at each of `times`, if it differs.

    Raises:
      UserError: If the solver is stochastic or multistep, or the prediction does not determine the noise at time 0.
    """
    if not isinstance(solver, Euler | Heun | Ddim) or solver.stochastic:
        raise UserError(f"solver={solver} is invalid: can't be run towards noise. Use euler, heun or ddim without eta.")
    if isinstance(prediction, X0):
        raise UserError(
            "prediction=X0() is invalid: at time 0, where inversion starts, it does not determine the noise. Use a "
            "model with another prediction."
        )
    start = init_sampling(solver, data, steps=times.shape[0] - 1)
    end = advance(denoise, start, times, process=process, solver=solver, prediction=prediction, model_times=model_times)
    noise = end.x / process.scale_initial_noise(jnp.ones(()))
    falling = None if model_times is None else model_times[::-1]
    reconstruction = sample(
        denoise, noise, times[::-1], process=process, solver=solver, prediction=prediction, model_times=falling
    )
    error = jnp.sqrt(jnp.square(reconstruction - data).mean(axis=tuple(range(1, data.ndim))))
    return Inversion(noise, reconstruction, error)
