r"""How likely a model finds data: the probability flow carries their density to that of noise, which is known.

With $r = \sqrt{\alpha^2 + \sigma^2}$ and the angle $\varphi$ of tangent $\sigma / \alpha$ every process is a rotation:
$u = x / r = \cos\varphi\,x_0 + \sin\varphi\,\epsilon$ moves with $du/d\varphi = v$, the prediction of that name (arXiv
2202.00512, appendix D). That is smooth where there is nothing of the data and where there is little but noise. Along
it the density changes by $d \log p / d\varphi = -\mathrm{tr}\,\partial v / \partial u$ (arXiv 1806.07366, eq. 8;
2011.13456, section 4.3), so that for data $x$ of $D$ values

$$\log p(x) = \log p_{noise}(x_1) + D \log r_1 + \int_0^{\varphi_1} \mathrm{tr} \frac{\partial v}{\partial u} d\varphi$$

The noise is what sampling starts from. The first time may lie above 0, for models that say nothing of the noise in
clean data: then it is the density of $x + (\sigma / \alpha)\,\epsilon$ at $x$.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.stats import norm
from jaxtyping import Array, Float, Key

from dit_video.core.errors import UserError
from dit_video.diffusion.predictions import Denoise, Prediction, Velocity, estimator
from dit_video.diffusion.processes.process import Process


class Likelihood(NamedTuple):
    """Of every example."""

    nats: Float[Array, " batch"]
    """the logarithm of the density"""
    bits_per_dimension: Float[Array, " batch"]
    """Its negative for each value, in bits; of pixels in [-1, 1] with 256 levels, add log2(127.5)."""


class Exact(NamedTuple):
    """The trace itself: as many derivatives as an example has values."""


class Hutchinson(NamedTuple):
    r"""An unbiased estimate of the trace: $E[v^T J v]$ over random signs $v$ (arXiv 1810.01367).

    The signs are those of a whole solution, so that it is of one flow, and each example's are its own.
    """

    keys: Key[Array, " batch"]
    """one an example, used for nothing else"""
    probes: int = 1
    """of which the estimate is the mean"""


Divergence = Exact | Hutchinson


def log_likelihood(
    denoise: Denoise,
    data: Float[Array, "batch *shape"],
    times: Float[Array, " times"],
    *,
    process: Process,
    prediction: Prediction = Velocity(),  # noqa: B008 (a value)
    divergence: Divergence = Exact(),  # noqa: B008 (a value)
) -> Likelihood:
    """The log-density of every example, by Heun's rule over the intervals of `times`: an error of second order.

    Args:
      denoise: the model; is given the time as a scalar.
      data: the examples, of which the model must treat each for itself.
      times: falling from 1, as those of sampling; at the last the data are put in.
      process: what the model was trained on.
      prediction: what the model predicts.
      divergence: how the trace is computed.

    Raises:
      UserError: less than one step, or another number of keys than there are examples.
    """
    if times.shape[0] < 2:
        raise UserError(f"the likelihood is computed in at least 1 step, not {times.shape[0] - 1}")
    if isinstance(divergence, Hutchinson) and divergence.keys.shape != data.shape[:1]:
        raise UserError(f"{data.shape[0]} examples need a key each, not {divergence.keys.shape}")
    directions = _directions(divergence, data)
    estimate = estimator(denoise, process, prediction)

    def rates(u, time):
        alpha, sigma, size = process.alpha(time), process.sigma(time), _size(process, time)

        def velocity(u):
            found = estimate(size * u, time)
            return (alpha * found.noise - sigma * found.data) / size

        return _with_trace(velocity, u, directions)

    def step(state, interval):
        u, gained = state
        time, following = interval
        turn = _angle(process, following) - _angle(process, time)
        here, trace = rates(u, time)
        there, next_trace = rates(u + turn * here, following)
        return (u + turn / 2 * (here + there), gained + turn / 2 * (trace + next_trace)), None

    rising = times[::-1]
    shrunk, size = process.alpha(rising[0]) / _size(process, rising[0]), _size(process, rising[-1])
    start = shrunk * data, jnp.zeros(data.shape[0])
    (end, gained), _ = jax.lax.scan(step, start, (rising[:-1], rising[1:]))
    values = math.prod(data.shape[1:])
    deviation = process.start(jnp.ones(()))
    prior = norm.logpdf(size * end, scale=deviation).reshape(data.shape[0], -1).sum(axis=1)
    nats = prior + gained + values * (jnp.log(size) + jnp.log(shrunk))
    return Likelihood(nats, -nats / (values * math.log(2)))


def _size(process: Process, time: Float[Array, ""]) -> Float[Array, ""]:
    return jnp.hypot(process.alpha(time), process.sigma(time))


def _angle(process: Process, time: Float[Array, ""]) -> Float[Array, ""]:
    return jnp.arctan2(process.sigma(time), process.alpha(time))


def _directions(divergence: Divergence, data: Float[Array, "batch *shape"]) -> Float[Array, "probes batch *shape"]:
    """Vectors whose squared forms add up to the trace, or do so on average."""
    shape = data.shape[1:]
    if isinstance(divergence, Exact):
        values = math.prod(shape)
        return jnp.broadcast_to(jnp.eye(values).reshape(values, 1, *shape), (values, *data.shape))

    def signs(key):
        return jax.random.rademacher(key, (divergence.probes, *shape), jnp.float32)

    return jnp.swapaxes(jax.vmap(signs)(divergence.keys), 0, 1) / math.sqrt(divergence.probes)


def _with_trace(
    function: Callable[[Array], Array], u: Float[Array, "batch *shape"], directions: Float[Array, "probes batch *shape"]
) -> tuple[Float[Array, "batch *shape"], Float[Array, " batch"]]:
    """A function of each example for itself, and the traces of its derivatives."""
    value, derivative = jax.linearize(function, u)

    def form(direction):
        return (direction * derivative(direction)).reshape(u.shape[0], -1).sum(axis=1)

    return value, jax.vmap(form)(directions).sum(axis=0)
