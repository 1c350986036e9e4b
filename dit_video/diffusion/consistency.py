r"""Consistency: from any time straight to the data, where the probability flow ends (arXiv 2303.01469).

$f(x_t, t)$ is the same all along a trajectory, and at time 0 it is $x$ itself. The data that a model estimates have
that second property for every prediction in which the noise has a part: at time 0, where $\alpha = 1$ and
$\sigma = 0$, they are what the model is given, whatever it says. (Of rectified flow $f = x - t\,v$.) The first one is
what distillation teaches: $f$ is to be the same at both ends of a step along the teacher's flow (latent consistency,
arXiv 2310.04378).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dit_video.core.errors import UserError
from dit_video.diffusion.predictions import X0, Denoise, Estimator, Prediction, estimator
from dit_video.diffusion.processes.process import Process
from dit_video.diffusion.samplers.sampler import Draw

Consistency = Callable[[Float[Array, "*shape"], Float[Array, "*time"]], Float[Array, "*shape"]]
"""`f(noisy, time) -> data`"""


def consistency_function(denoise: Denoise, process: Process, prediction: Prediction) -> Consistency:
    """$f$ of a model: the data that it estimates.

    Raises:
      UserError: a model that predicts the data themselves, which at time 0 needn't be what it is given.
    """
    if isinstance(prediction, X0):
        raise UserError(
            "a model that predicts X0 is no consistency function at time 0; distil one that predicts Velocity, V, "
            "Epsilon or Preconditioned"
        )
    estimate = estimator(denoise, process, prediction)
    return lambda noisy, time: estimate(noisy, time).data


def flow_step(
    estimate: Estimator,
    process: Process,
    noisy: Float[Array, "*shape"],
    time: Float[Array, "*time"],
    following: Float[Array, "*time"],
) -> Float[Array, "*shape"]:
    """Where the teacher's flow has come to at the following time, by one step of DDIM; times may differ by token."""
    found = estimate(noisy, time)
    return process.add_noise(found.data, found.noise, following)


def consistency_loss(
    student: Consistency,
    target: Consistency,
    noisy: Float[Array, "*batch p"],
    reached: Float[Array, "*batch p"],
    time: Float[Array, "*#batch 1"],
    following: Float[Array, "*#batch 1"],
    *,
    width: float = 0.03,
) -> Float[Array, "*batch"]:
    r"""$\sqrt{\lVert d \rVert^2 / p + w^2} - w$ of $d = f_\theta(x_t, t) - f_{\theta^-}(x_s, s)$, for every token.

    That is pseudo-Huber's: where large differences count no more than their size, the few that are (of the noisiest
    times, from where all data are in reach) don't drown the others (arXiv 2310.14189, section 3.3). No gradient reaches
    the target.

    Args:
      student: $f_\theta$, which is trained.
      target: $f_{\theta^-}$, its moving average.
      noisy: $x_t$.
      reached: $x_s$, on the trajectory through $x_t$.
      time: $t$.
      following: $s$, nearer to the data.
      width: $w$; differences far below it count by their squares.
    """
    wanted = jax.lax.stop_gradient(target(reached, following))
    difference = (student(noisy, time) - wanted).astype(jnp.float32)
    return jnp.sqrt(jnp.square(difference).mean(axis=-1) + width**2) - width


def multistep(
    f: Consistency,
    noise: Float[Array, "*shape"],
    times: Float[Array, "times *time"],
    *,
    process: Process,
    draw: Draw,
    steps: Int[Array, ""] | int,
) -> Float[Array, "*shape"]:
    r"""What $f$ is given at its step of number `steps` (from 0 on): the samples of those before it, noised again.

    Each step's data are noised anew to the next time (arXiv 2303.01469, algorithm 1), by `draw(number of the step)`.
    `steps` may be a traced number; no gradient passes through the steps.

    Args:
      f: the model.
      noise: standard normal, of time 1.
      times: falling from 1; they may differ by token.
      process: of the model.
      draw: standard normal noise for a step.
      steps: how many are done.
    """

    def step(number, x):
        return process.add_noise(f(x, times[number]), draw(number), times[number + 1])

    return jax.lax.stop_gradient(jax.lax.fori_loop(0, steps, step, process.start(noise)))
