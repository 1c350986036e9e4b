"""Targets of distillation: consistency models and distribution matching."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dit_video.core.errors import UserError
from dit_video.diffusion.objective import DenoiseFn, Estimator, Prediction, make_estimator, predicts_data
from dit_video.diffusion.processes import Process, Times, Values
from dit_video.diffusion.samplers import NoiseFn

ConsistencyFn = Callable[[Values, Times], Values]
"""The function `f(noisy, time) -> data`."""


def make_consistency_fn(denoise: DenoiseFn, process: Process, prediction: Prediction) -> ConsistencyFn:
    """Return $f$ of a model: the data that it estimates.

    Raises:
      UserError: If the model predicts the data themselves, which need not equal its input at time 0.
    """
    if predicts_data(prediction):
        raise UserError(
            f"prediction={prediction} is invalid: a model that predicts X0 is no consistency function at time 0. "
            "Distil one that predicts Velocity, V, Epsilon or Preconditioning."
        )
    estimate = make_estimator(denoise, process, prediction)
    return lambda noisy, time: estimate(noisy, time).data


def step_along_flow(estimate: Estimator, process: Process, noisy: Values, time: Times, next_time: Times) -> Values:
    """Move along the teacher's flow to the next time by one step of DDIM; times may differ between tokens."""
    prediction = estimate(noisy, time)
    return process.add_noise(prediction.data, prediction.noise, next_time)


def consistency_loss(
    student: ConsistencyFn,
    target: ConsistencyFn,
    noisy: Float[Array, "*batch p"],
    next_noisy: Float[Array, "*batch p"],
    time: Float[Array, "*#batch 1"],
    next_time: Float[Array, "*#batch 1"],
    *,
    width: float = 0.03,
) -> Float[Array, "*batch"]:
    r"""Return the pseudo-Huber consistency loss of every token.

    It is $\sqrt{\lVert d \rVert^2 / p + w^2} - w$ of $d = f_\theta(x_t, t) - f_{\theta^-}(x_s, s)$.

    Large differences count in proportion to their size. The few large ones (at the noisiest times, from which all data
    are reachable) thus do not dominate the others (arXiv 2310.14189, section 3.3). No gradient flows into the target.

    Args:
      student: $f_\theta$, the trained function.
      target: $f_{\theta^-}$, its moving average.
      noisy: $x_t$.
      next_noisy: $x_s$, on the trajectory through $x_t$.
      time: $t$.
      next_time: $s$, closer to the data.
      width: $w$; differences far below it are squared.
    """
    expected = jax.lax.stop_gradient(target(next_noisy, next_time))
    difference = (student(noisy, time) - expected).astype(jnp.float32)
    return jnp.sqrt(jnp.square(difference).mean(axis=-1) + width**2) - width


def run_multistep(
    f: ConsistencyFn,
    noise: Values,
    times: Float[Array, "times *time"],
    *,
    process: Process,
    noise_fn: NoiseFn,
    steps: Int[Array, ""] | int,
) -> Values:
    """Return the input of $f$ at step number `steps`, counted from 0.

    It is the sample after the preceding steps, with noise added again. Each step adds fresh noise to its data to reach
    the next time (arXiv 2303.01469, algorithm 1). The noise is `noise_fn(step number)`. `steps` may be a traced number;
    no gradient passes through the steps.

    Args:
      f: The model.
      noise: Standard normal noise, the sample at time 1.
      times: Times that fall from 1; they may differ between tokens.
      process: The process of the model.
      noise_fn: Standard normal noise by step number.
      steps: Number of steps that are taken.
    """

    def step(number, x):
        return process.add_noise(f(x, times[number]), noise_fn(number), times[number + 1])

    return jax.lax.stop_gradient(jax.lax.fori_loop(0, steps, step, process.scale_initial_noise(noise)))


_MIN_NORMALIZER = 1e-6
"""Lower bound of the normalizer of `matching_gradient`."""


def matching_gradient(
    generated: Float[Array, "*batch n p"],
    real: Float[Array, "*batch n p"],
    fake: Float[Array, "*batch n p"],
    normalizer: Float[Array, "*batch n 1"],
) -> Float[Array, "*batch n p"]:
    r"""Return the gradient in the samples, $(\hat x_{0, fake} - \hat x_{0, real}) / normalizer$ (2311.18828, eq. 8).

    Args:
      generated: The samples.
      real: The data that the teacher estimates from the noised samples.
      fake: The data that the critic estimates from them.
      normalizer: Mean distance of the teacher's estimate from each sample; see `compute_distance`.
    """
    return (fake - real) / jnp.maximum(normalizer, _MIN_NORMALIZER)


def compute_distance(generated: Float[Array, "*batch p"], real: Float[Array, "*batch p"]) -> Float[Array, "*batch"]:
    """Return the mean absolute difference of two tokens; its mean over a sample's tokens is the normalizer above."""
    return jnp.abs(generated - real).mean(axis=-1)


def matching_loss(generated: Float[Array, "*batch p"], gradient: Float[Array, "*batch p"]) -> Float[Array, "*batch"]:
    """Return a loss per token with this gradient in the samples, up to the mean over a token's values.

    It is half the squared distance to the moved samples. The gradient is treated as a constant, even if it depends on
    the generator's parameters.
    """
    expected = jax.lax.stop_gradient(generated - gradient)
    return 0.5 * jnp.square((generated - expected).astype(jnp.float32)).mean(axis=-1)
