r"""DPM-Solver++: exponential integrators of second order in the log-SNR (arXiv 2211.01095).

With $\lambda = \log(\alpha / \sigma)$ and $h = \lambda_t - \lambda_s$, the reverse process (see the package docstring)
from time $s$ to $t$ has the solution

$$x_t = \frac{\sigma_t}{\sigma_s} e^{-\eta^2 h} x_s
+ \alpha_t \big(1 - e^{-(1 + \eta^2) h}\big)\, m + \sigma_t \sqrt{1 - e^{-2 \eta^2 h}}\, z$$

if the estimated data are constant at $m$: with $\eta = 0$ this is DDIM, with $\eta = 1$ a step of DDPM. The second
order takes the line through two evaluations, $m(\lambda) = m_s + (\lambda - \lambda_s)\, m'$. Then either $m$ above is
its value half a step ahead (`midpoint`), or the line is integrated exactly (`heun`).
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dit_video.core.errors import UserError
from dit_video.diffusion.predictions import Estimator
from dit_video.diffusion.processes.process import Process, Values
from dit_video.diffusion.samplers.solvers import Solver, StepInterval

DpmKind = Literal["midpoint", "heun"]

_LOWER_ORDER_STEP_LIMIT = 15
"""Number of steps below which a last step of first order is more stable."""


class DpmState(NamedTuple):
    """The state of both solvers."""

    x: Values
    """The current sample."""
    start_x: Values
    """The sample at the start of the last step."""
    data: Values
    """The data estimated at the start of the last step."""
    time: Float[Array, ""]
    """The time at the start of the last step."""
    steps_done: Int[Array, ""]
    """Number of steps that are done."""
    steps_left: Int[Array, ""]
    """Number of steps that remain."""


class _DpmSolver(Solver):
    def init(self, noisy: Values, *, steps: int) -> DpmState:
        nothing = jnp.zeros((), jnp.int32)
        return DpmState(noisy, noisy, jnp.zeros_like(noisy), jnp.ones(()), nothing, nothing + steps)


@dataclass(frozen=True, kw_only=True)
class DpmMultistep(_DpmSolver):
    """DPM-Solver++(2M), or its SDE form with `eta` 1; one evaluation per step.

    The line goes through the previous evaluation. The first step is of first order, and so is the one after a step from
    pure noise and a step to time 0, where the log-SNR is infinite.

    Raises:
      UserError: If eta is negative.
    """

    order: Literal[1, 2] = 2
    kind: DpmKind = "midpoint"
    eta: float = 0.0
    """Amount of fresh noise: 0 is the probability flow, 1 the reverse SDE."""
    lower_order_final: bool = True
    """Makes the last step first order if there are fewer than 15 steps."""

    def __post_init__(self):
        if not 0 <= self.eta < float("inf"):
            raise UserError(f"eta={self.eta} is invalid: must be finite and >= 0. Use 0 for the flow, 1 for the SDE.")

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def step(self, estimate: Estimator, process: Process, state: DpmState, interval: StepInterval) -> DpmState:
        """Take a step of algorithm 2 of arXiv 2211.01095."""
        time, next_time, _ = interval
        data = estimate(state.x, time).data
        is_first_order = (state.steps_done == 0) | (next_time == 0) | (self.order == 1)
        is_first_order |= process.alpha(state.time) == 0
        if self.lower_order_final:
            is_first_order |= (state.steps_left == 1) & (state.steps_done + state.steps_left < _LOWER_ORDER_STEP_LIMIT)
        # The slope of the line needs the step lengths before and after this evaluation. A first-order step has no
        # previous evaluation: any length but 0 avoids a division by zero there, and `length` 0 removes the slope.
        previous_length = jnp.where(is_first_order, 1.0, _compute_length(process, state.time, time))
        length = jnp.where(is_first_order, 0.0, _compute_length(process, time, next_time))
        rise = length / previous_length * (data - state.data)
        x = _advance(process, state.x, interval, data, rise, self.kind, self.eta)
        return DpmState(x, state.x, data, time.astype(state.time.dtype), state.steps_done + 1, state.steps_left - 1)


@dataclass(frozen=True, kw_only=True)
class DpmSinglestep(_DpmSolver):
    """DPM-Solver++(2S): a step spans two intervals and evaluates at the time between them; one evaluation per interval.

    The first interval is a first-order step to the midpoint. The second one restarts from the step's start, now along
    the line. A last interval without a second one is of first order, and so is one to time 0.
    """

    kind: DpmKind = "midpoint"
    lower_order_final: bool = True
    """Makes the last interval first order."""

    def step(self, estimate: Estimator, process: Process, state: DpmState, interval: StepInterval) -> DpmState:
        """Take half a step of algorithm 1 of arXiv 2211.01095, with one evaluation."""
        time, next_time, _ = interval
        data = estimate(state.x, time).data
        is_first_order = (state.steps_done % 2 == 0) | (next_time == 0)
        if self.lower_order_final:
            is_first_order |= state.steps_left == 1
        start = jnp.where(is_first_order, state.x, state.start_x)
        start_data = jnp.where(is_first_order, data, state.data)
        start_time = jnp.where(is_first_order, time.astype(state.time.dtype), state.time)
        previous_length = jnp.where(is_first_order, 1.0, _compute_length(process, start_time, time))
        length = jnp.where(is_first_order, 0.0, _compute_length(process, start_time, next_time))
        rise = length / previous_length * (data - start_data)
        x = _advance(process, start, StepInterval(start_time, next_time), start_data, rise, self.kind, 0.0)
        return DpmState(x, start, start_data, start_time, state.steps_done + 1, state.steps_left - 1)


def _advance(
    process: Process, x: Values, interval: StepInterval, data: Values, rise: Values, kind: DpmKind, eta: float
) -> Values:
    """Return the solution of the module docstring for data that change by `rise` over the interval."""
    time, next_time, noise = interval
    alpha, sigma, h = process.alpha(next_time), process.sigma(next_time), _compute_length(process, time, next_time)
    rate = 1 + eta**2
    share = -jnp.expm1(-rate * h)
    slope_term = alpha * (share / 2 if kind == "midpoint" else 1 - share / (rate * h)) * rise
    deterministic = sigma / process.sigma(time) * x + alpha * share * data + slope_term
    if eta == 0:
        return deterministic
    assert noise is not None, "the sampling loop passes noise to stochastic solvers"
    # The solution scales `x` by e^{-eta^2 h}; `deterministic` has the factor 1, as for eta=0. Of pure noise nothing is
    # left: there h is infinite, while that of `half_log_snr` is bounded.
    decay = sigma / process.sigma(time) * jnp.where(process.alpha(time) == 0, -1.0, jnp.expm1(-(eta**2) * h)) * x
    return deterministic + decay + sigma * jnp.sqrt(-jnp.expm1(-2 * eta**2 * h)) * noise


def _compute_length(process: Process, time: Float[Array, ""], next_time: Float[Array, ""]) -> Float[Array, ""]:
    """Return $h$, the difference of log-SNRs between two times."""
    return process.half_log_snr(next_time) - process.half_log_snr(time)
