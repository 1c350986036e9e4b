"""From data back to the noise that they would be sampled from: the probability flow, solved towards noise.

DDIM's inversion (arXiv 2010.02502, section 4.3) for any process; of rectified flow it is the flow's own.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from dit_video.core.errors import UserError
from dit_video.diffusion.predictions import X0, Denoise, Prediction, Velocity
from dit_video.diffusion.processes.process import Process
from dit_video.diffusion.samplers.ancestral import Ddim
from dit_video.diffusion.samplers.sampler import Sampler, advance, sample
from dit_video.diffusion.samplers.solvers import Euler, Heun


class Inversion(NamedTuple):
    """Noise, and how far from the data it leads back."""

    noise: Float[Array, "B *shape"]
    """standard normal if the model is right: what `sample` starts from"""
    data: Float[Array, "B *shape"]
    """what is sampled from it, with the same solver at the same times"""
    error: Float[Array, " B"]
    """of each sample's data: the root of its mean square"""


def invert(
    denoise: Denoise,
    data: Float[Array, "B *shape"],
    times: Float[Array, " times"],
    *,
    process: Process,
    solver: Sampler = Euler(),  # noqa: B008 (a value)
    prediction: Prediction = Velocity(),  # noqa: B008 (a value)
    told: Float[Array, " times"] | None = None,
) -> Inversion:
    """The noise of given data, and the data of that noise. Costs twice what sampling costs.

    The way back is not the way there: a step evaluates the model at its start, which is the other end. The error falls
    with the number of steps at the solver's order.

    Args:
      denoise: the model, without guidance or with little: guidance has no flow that leads back.
      data: to be inverted.
      times: rising from 0 to 1: a grid's, backwards.
      process: what the model was trained on.
      solver: of one step and without noise.
      prediction: what the model predicts.
      told: what the model is given as its time at each of `times`, where that is something else.

    Raises:
      UserError: a solver that needs a past, noise, or a prediction that says nothing of the noise in data.
    """
    if not isinstance(solver, Euler | Heun | Ddim) or solver.stochastic:
        raise UserError(f"{solver} can't be run towards noise; use euler, heun or ddim without eta")
    if isinstance(prediction, X0):
        raise UserError("a model that predicts the data says nothing of the noise in them, where inversion starts")
    start = solver.init(data, steps=times.shape[0] - 1)
    reached = advance(denoise, start, times, process=process, solver=solver, prediction=prediction, told=told).x
    noise = reached / process.start(jnp.ones(()))
    back = sample(
        denoise,
        noise,
        times[::-1],
        process=process,
        solver=solver,
        prediction=prediction,
        told=None if told is None else told[::-1],
    )
    error = jnp.sqrt(jnp.square(back - data).mean(axis=tuple(range(1, data.ndim))))
    return Inversion(noise, back, error)
