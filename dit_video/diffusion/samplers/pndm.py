r"""PNDM: linear multistep methods with the exact move of DDIM between two times (arXiv 2202.09778).

A step from time $s$ to $t$ moves the sample as if a value $e$ of the model were constant, which is DDIM; the value is
combined from several evaluations with the weights of Adams and Bashforth for uniform steps,

$$e = \tfrac{1}{24} (55 e_s - 59 e_{s-1} + 37 e_{s-2} - 9 e_{s-3}),$$

and those of lower order while fewer are known. These weights are exact to fourth order if the position that $e$ is the
slope of is linear in time, as in rectified flow; for other processes the method is of second order, with a smaller
error than DDIM's. Without past evaluations a step starts by one of two methods (`start`).
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dit_video.core.errors import UserError
from dit_video.diffusion.predictions import Estimator, V
from dit_video.diffusion.processes.process import Estimate, Process, Values
from dit_video.diffusion.samplers.solvers import Solver, StepInterval

_ADAMS_BASHFORTH = (
    (1.0, 0.0, 0.0, 0.0),
    (3 / 2, -1 / 2, 0.0, 0.0),
    (23 / 12, -16 / 12, 5 / 12, 0.0),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
"""Weights of the latest evaluations, the newest first, for orders 1 to 4."""


class PndmState(NamedTuple):
    """The state of PNDM."""

    x: Values
    """The current sample."""
    values: Float[Array, "4 *shape"]
    """Values at the starts of the latest steps, the newest first."""
    steps_done: Int[Array, ""]
    """Number of steps that are done."""


@dataclass(frozen=True, kw_only=True)
class Pndm(Solver):
    """PNDM, for uniformly spaced times: one evaluation per step after the start.

    A step to the data is not started by evaluations at its end, since few models predict the noise in data without
    noise.

    Raises:
      UserError: If there are no training steps.
    """

    start: Literal["heun", "runge-kutta"] = "heun"
    """Steps without past evaluations: one with the mean of two (PLMS, the samplers of Stable Diffusion), or three with
    four each (the paper's)."""
    value: Literal["slope", "v"] = "slope"
    """Value that is combined: the slope in `Process.flow_coordinates`, which is the noise or the velocity of a flow, or
    that of a v prediction, as in diffusers for models that make one, with which the method is of first order only."""
    training_steps: int | None = None
    """Number of the model's noise steps, to which the midpoints of Runge-Kutta steps are rounded; None for models of
    continuous time."""

    def __post_init__(self):
        if self.training_steps is not None and self.training_steps < 1:
            raise UserError(f"training_steps={self.training_steps} is invalid: use 1 or more, or None.")

    def check(self, process: Process) -> None:
        """Check that the value determines the move at time 1."""
        with jax.ensure_compile_time_eval():
            is_finite = bool(jnp.isfinite(process.flow_coordinates(jnp.ones(())).integration_time))
        if self.value == "slope" and not is_finite:
            raise UserError(
                f"solver pndm is invalid: it moves the noise of {type(process).__name__} in x / alpha, and alpha is 0 "
                'at its noise. Use Pndm(value="v"), euler, ddim, dpm++2m or unipc.'
            )

    def init(self, noisy: Values, *, steps: int) -> PndmState:
        """Return the state before the first of `steps` steps."""
        return PndmState(noisy, jnp.zeros((4, *noisy.shape), noisy.dtype), jnp.zeros((), jnp.int32))

    def step(self, estimate: Estimator, process: Process, state: PndmState, interval: StepInterval) -> PndmState:
        """Combine the values of this step's evaluations, or of the latest steps, and move the sample by them."""
        time, next_time, _ = interval

        def evaluate(x: Values, end: Float[Array, ""]) -> Values:
            return self._get_value(process, estimate(x, end), end)

        def move(value: Values, end: Float[Array, ""]) -> Values:
            return self._move(process, state.x, value, time, end)

        value = evaluate(state.x, time)
        values = jnp.concatenate([value[None], state.values[:-1]])

        def start() -> Values:
            if self.start == "heun":
                return (value + evaluate(move(value, next_time), next_time)) / 2
            middle, above = self._find_middle(time, next_time)
            # If it lies between two noise steps, diffusers moves to one of them and evaluates at the other.
            second = evaluate(move(value, above), middle)
            third = evaluate(move(second, middle), middle)
            return (value + 2 * second + 2 * third + evaluate(move(third, next_time), next_time)) / 6

        def extrapolate() -> Values:
            weights = jnp.asarray(_ADAMS_BASHFORTH, values.dtype)[jnp.minimum(state.steps_done, 3)]
            return jnp.einsum("k,k...->...", weights, values, precision=jax.lax.Precision.HIGHEST)

        is_start = (state.steps_done < (1 if self.start == "heun" else 3)) & (next_time != 0)
        combined = jax.lax.cond(is_start, start, extrapolate)
        return PndmState(move(combined, next_time), values, state.steps_done + 1)

    def _get_value(self, process: Process, estimate: Estimate, time: Float[Array, ""]) -> Values:
        if self.value == "slope":
            return process.flow_slope(estimate)
        return V().target(process, estimate.data, estimate.noise, time)

    def _move(
        self, process: Process, x: Values, value: Values, time: Float[Array, ""], end: Float[Array, ""]
    ) -> Values:
        """Return the sample at `end` if the value is constant from `time` on."""
        if self.value == "v":
            estimate = V().estimate(process, x, value, time)
            return process.add_noise(estimate.data, estimate.noise, end)
        here, there = process.flow_coordinates(time), process.flow_coordinates(end)
        return there.scale * (x / here.scale + (there.integration_time - here.integration_time) * value)

    def _find_middle(
        self, time: Float[Array, ""], next_time: Float[Array, ""]
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Return the midpoint, rounded down and up to noise steps."""
        middle = (time + next_time) / 2
        if self.training_steps is None:
            return middle, middle
        # The margins are for times that are steps up to rounding.
        step = middle * self.training_steps
        return jnp.floor(step + 1e-3) / self.training_steps, jnp.ceil(step - 1e-3) / self.training_steps
