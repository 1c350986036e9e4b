r"""The likelihood of data under a model.

The probability flow transports the density of the data to that of noise, which is known.

With $r = \sqrt{\alpha^2 + \sigma^2}$ and the angle $\varphi$ of tangent $\sigma / \alpha$, every process is a rotation:
$u = x / r = \cos\varphi\,x_0 + \sin\varphi\,\epsilon$ moves with $du/d\varphi = v$, the prediction of that name (arXiv
2202.00512, appendix D). It is smooth both at pure noise and near the data. Along it the density changes by
$d \log p / d\varphi = -\mathrm{tr}\,\partial v / \partial u$ (arXiv 1806.07366, eq. 8; 2011.13456, section 4.3), so
that for data $x$ of $D$ values

$$\log p(x) = \log p_{noise}(x_1) + D \log r_1 + \int_0^{\varphi_1} \mathrm{tr} \frac{\partial v}{\partial u} d\varphi$$

The noise is the start of sampling. The first time may be above 0, for models that do not determine the noise in clean
data: then the result is the density of $x + (\sigma / \alpha)\,\epsilon$ at $x$.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.stats import norm
from jaxtyping import Array, Float, Key

from dit_video.core.errors import UserError, check_at_least
from dit_video.diffusion.objective import DenoiseFn, Prediction, Velocity, make_estimator
from dit_video.diffusion.processes import Process


class Likelihood(NamedTuple):
    """The log-density of every example."""

    nats: Float[Array, "*examples"]
    """Logarithm of the density."""
    bits_per_dimension: Float[Array, "*examples"]
    """Negative log-density per value, in bits; for pixels in [-1, 1] with 256 levels add log2(127.5)."""


class ExactTrace(NamedTuple):
    """The trace itself, which takes as many derivatives as an example has values."""


class HutchinsonTrace(NamedTuple):
    """An unbiased estimate of the trace: $E[v^T J v]$ over random signs $v$ (arXiv 1810.01367).

    The signs are constant along the whole solution, so that it follows one flow. They are independent between examples.
    """

    keys: Key[Array, " batch"]
    """One key per example, used for nothing else."""
    probes: int = 1
    """Number of random vectors that the estimate averages."""


class ProbeTrace(NamedTuple):
    """Hutchinson's estimate with these probes, for arrays that hold several examples in a row."""

    probes: Float[Array, "probes batch *shape"]
    """Random signs of every value."""


Divergence = ExactTrace | HutchinsonTrace | ProbeTrace

SumFn = Callable[[Float[Array, "batch *shape"]], Float[Array, "*examples"]]
"""The function `sum_values(values)`: the sum over the values of every example."""


def sum_rows(values: Float[Array, "batch *shape"]) -> Float[Array, " batch"]:
    """Return the sum of each row, for arrays with one example per row."""
    return values.reshape(values.shape[0], -1).sum(axis=1)


def log_likelihood(
    denoise: DenoiseFn,
    data: Float[Array, "batch *shape"],
    times: Float[Array, " times"],
    *,
    process: Process,
    prediction: Prediction = Velocity(),  # noqa: B008 (a value)
    divergence: Divergence = ExactTrace(),  # noqa: B008 (a value)
    sum_values: SumFn = sum_rows,
) -> Likelihood:
    """Return the log-density of every example by Heun's rule over the intervals of `times`, which is of second order.

    Args:
      denoise: The model; it gets the time as a scalar.
      data: The examples; the model must treat each of them independently.
      times: Times that fall from 1, as for sampling; the data are inserted at the last one.
      process: The process that the model was trained on.
      prediction: The kind of the model's prediction.
      divergence: The way to compute the trace; `ProbeTrace` if a row holds several examples.
      sum_values: Sum over the values of every example; by default each row is one example. Other values, such as
        padding, are transported along but do not count.

    Raises:
      UserError: If there is no step, or the number of keys differs from the number of examples.
    """
    check_at_least(2, times=len(times))
    if isinstance(divergence, HutchinsonTrace) and divergence.keys.shape != data.shape[:1]:
        raise UserError(f"keys of shape {divergence.keys.shape} are invalid: {data.shape[0]} examples need a key each.")
    directions = _make_directions(divergence, data)
    estimate = make_estimator(denoise, process, prediction)

    def rates(u, time):
        alpha, sigma, radius = process.alpha(time), process.sigma(time), _compute_radius(process, time)

        def velocity(u):
            predicted = estimate(radius * u, time)
            return (alpha * predicted.noise - sigma * predicted.data) / radius

        return _compute_with_trace(velocity, u, directions, sum_values)

    def step(state, interval):
        u, log_density = state
        time, next_time = interval
        rotation = _compute_angle(process, next_time) - _compute_angle(process, time)
        slope, trace = rates(u, time)
        next_slope, next_trace = rates(u + rotation * slope, next_time)
        return (u + rotation / 2 * (slope + next_slope), log_density + rotation / 2 * (trace + next_trace)), None

    rising = times[::-1]
    data_scale = process.alpha(rising[0]) / _compute_radius(process, rising[0])
    radius = _compute_radius(process, rising[-1])
    values = sum_values(jnp.ones_like(data))
    start = data_scale * data, jnp.zeros_like(values)
    (end, log_density), _ = jax.lax.scan(step, start, (rising[:-1], rising[1:]))
    std = process.scale_initial_noise(jnp.ones(()))
    prior = sum_values(norm.logpdf(radius * end, scale=std))
    nats = prior + log_density + values * (jnp.log(radius) + jnp.log(data_scale))
    return Likelihood(nats, -nats / (jnp.maximum(values, 1) * math.log(2)))


def _compute_radius(process: Process, time: Float[Array, ""]) -> Float[Array, ""]:
    return jnp.hypot(process.alpha(time), process.sigma(time))


def _compute_angle(process: Process, time: Float[Array, ""]) -> Float[Array, ""]:
    return jnp.arctan2(process.sigma(time), process.alpha(time))


def _make_directions(divergence: Divergence, data: Float[Array, "batch *shape"]) -> Float[Array, "probes batch *shape"]:
    """Return vectors whose squared forms sum to the trace, exactly or on average."""
    shape = data.shape[1:]
    if isinstance(divergence, ProbeTrace):
        return divergence.probes / math.sqrt(len(divergence.probes))
    if isinstance(divergence, ExactTrace):
        values = math.prod(shape)
        return jnp.broadcast_to(jnp.eye(values).reshape(values, 1, *shape), (values, *data.shape))

    def signs(key):
        return jax.random.rademacher(key, (divergence.probes, *shape), jnp.float32)

    return jnp.swapaxes(jax.vmap(signs)(divergence.keys), 0, 1) / math.sqrt(divergence.probes)


def _compute_with_trace(
    function: Callable[[Array], Array],
    u: Float[Array, "batch *shape"],
    directions: Float[Array, "probes batch *shape"],
    sum_values: SumFn,
) -> tuple[Float[Array, "batch *shape"], Float[Array, "*examples"]]:
    """Return the values of a function of each example alone, and the traces of its Jacobians.

    Derivatives are taken backwards, because some attention kernels define no forward derivative.
    """
    value, pull_back = jax.vjp(function, u)

    def form(direction):
        return sum_values(direction * pull_back(direction)[0])

    return value, jax.vmap(form)(directions).sum(axis=0)
