r"""DPM-Solver++: exponential integrators of second order in the log-SNR (arXiv 2211.01095).

With $\lambda = \log(\alpha / \sigma)$ and $h = \lambda_t - \lambda_s$ the reverse process of the package's docstring
between two times, from $s$ to $t$, has the solution

$$x_t = \frac{\sigma_t}{\sigma_s} e^{-\eta^2 h} x_s
+ \alpha_t \big(1 - e^{-(1 + \eta^2) h}\big)\, m + \sigma_t \sqrt{1 - e^{-2 \eta^2 h}}\, z$$

if the estimated data stay at $m$: with $\eta = 0$ that is DDIM, with $\eta = 1$ a step of DDPM. Of second order they
are a line through two evaluations, $m(\lambda) = m_s + (\lambda - \lambda_s)\, m'$; then $m$ above is its value half a
step ahead (`midpoint`), or the line is integrated exactly (`heun`).
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dit_video.core.errors import UserError
from dit_video.diffusion.predictions import Estimator
from dit_video.diffusion.processes.process import Process
from dit_video.diffusion.samplers.solvers import Interval, Solver

Kind = Literal["midpoint", "heun"]

_FEW_STEPS = 15
"""With fewer a last step of first order is steadier."""


class DpmState(NamedTuple):
    """What both solvers carry."""

    x: Float[Array, "*shape"]
    start: Float[Array, "*shape"]
    """the sample that the last step started from"""
    data: Float[Array, "*shape"]
    """as they were estimated there"""
    time: Float[Array, ""]
    """of that start"""
    done: Int[Array, ""]
    left: Int[Array, ""]
    """steps"""


class _Dpm(Solver):
    def init(self, noisy: Float[Array, "*shape"], *, steps: int) -> DpmState:
        nothing = jnp.zeros((), jnp.int32)
        return DpmState(noisy, noisy, jnp.zeros_like(noisy), jnp.ones(()), nothing, nothing + steps)


@dataclass(frozen=True, kw_only=True)
class DpmMultistep(_Dpm):
    """2M, and with `eta` 1 its SDE form: the line goes through the last evaluation too; one evaluation a step.

    The first step is of first order, and so is one to time 0, where the log-SNR is infinite.

    Raises:
      UserError: an eta below 0.
    """

    order: Literal[1, 2] = 2
    kind: Kind = "midpoint"
    eta: float = 0.0
    """how much noise is drawn anew: 0 is the probability flow, 1 the reverse SDE"""
    lower_order_final: bool = True
    """whether the last of fewer than 15 steps is of first order"""

    def __post_init__(self):
        if not 0 <= self.eta < float("inf"):
            raise UserError(f"eta {self.eta} is out of range; 0 draws no noise, 1 is the reverse SDE")

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def step(self, estimate: Estimator, process: Process, state: DpmState, interval: Interval) -> DpmState:
        """Algorithm 2 of arXiv 2211.01095."""
        time, following, noise = interval
        data = estimate(state.x, time).data
        first = (state.done == 0) | (following == 0) | (self.order == 1)
        if self.lower_order_final:
            first |= (state.left == 1) & (state.done + state.left < _FEW_STEPS)
        # From the evaluation before to this one; where there is none, any length serves.
        before = jnp.where(first, 1.0, _length(process, state.time, time))
        ahead = jnp.where(first, 0.0, _length(process, time, following))
        rise = ahead / before * (data - state.data)
        x = _advance(process, state.x, Interval(time, following, noise), data, rise, self.kind, self.eta)
        return DpmState(x, state.x, data, _like(time, state.time), state.done + 1, state.left - 1)


@dataclass(frozen=True, kw_only=True)
class DpmSinglestep(_Dpm):
    """2S: two intervals are one step, whose midpoint lies between them; one evaluation an interval.

    From the first interval's end the step is taken anew from its start, now along the line. A last interval without a
    second one is of first order, and so is one to time 0.
    """

    kind: Kind = "midpoint"
    lower_order_final: bool = True
    """whether the last interval is of first order"""

    def step(self, estimate: Estimator, process: Process, state: DpmState, interval: Interval) -> DpmState:
        """Algorithm 1 of arXiv 2211.01095, an evaluation at a time."""
        time, following, _ = interval
        data = estimate(state.x, time).data
        first = (state.done % 2 == 0) | (following == 0)
        if self.lower_order_final:
            first |= state.left == 1
        start = jnp.where(first, state.x, state.start)
        held = jnp.where(first, data, state.data)
        since = jnp.where(first, _like(time, state.time), state.time)
        before = jnp.where(first, 1.0, _length(process, since, time))
        whole = jnp.where(first, 0.0, _length(process, since, following))
        rise = whole / before * (data - held)
        x = _advance(process, start, Interval(since, following), held, rise, self.kind, 0.0)
        return DpmState(x, start, held, since, state.done + 1, state.left - 1)


def _advance(
    process: Process,
    x: Float[Array, "*shape"],
    interval: Interval,
    data: Float[Array, "*shape"],
    rise: Float[Array, "*shape"],
    kind: Kind,
    eta: float,
) -> Float[Array, "*shape"]:
    """The solution of the module's docstring, where the data rise by `rise` over the interval."""
    time, following, noise = interval
    alpha, sigma, h = process.alpha(following), process.sigma(following), _length(process, time, following)
    rate = 1 + eta**2
    share = -jnp.expm1(-rate * h)
    rising = alpha * (share / 2 if kind == "midpoint" else 1 - share / (rate * h)) * rise
    ahead = sigma / process.sigma(time) * x + alpha * share * data + rising
    if eta == 0:
        return ahead
    assert noise is not None, "of a stochastic solver the loop sees to it"
    forgotten = sigma / process.sigma(time) * jnp.expm1(-(eta**2) * h) * x
    return ahead + forgotten + sigma * jnp.sqrt(-jnp.expm1(-2 * eta**2 * h)) * noise


def _length(process: Process, time: Float[Array, ""], following: Float[Array, ""]) -> Float[Array, ""]:
    """$h$ from one time to another."""
    return process.half_log_snr(following) - process.half_log_snr(time)


def _like(value: Float[Array, ""], other: Float[Array, ""]) -> Float[Array, ""]:
    return value.astype(other.dtype)
