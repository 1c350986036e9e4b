"""The interface of solvers, and deterministic one-step solvers, whose state is the sample alone."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dit_video.core.errors import UserError
from dit_video.diffusion.predictions import Estimator
from dit_video.diffusion.processes.process import Process, Values


class StepInterval(NamedTuple):
    """The times of one step, and its noise."""

    time: Float[Array, ""]
    next_time: Float[Array, ""]
    noise: Values | None = None
    """Standard normal noise of this step."""


class Solver(ABC):
    """A method that steps from noise to data, one interval per step.

    It evaluates `estimate` at the ends of an interval or between them, where the model time is interpolated linearly.
    The first evaluation of a step is at its start and outside of control flow such as `lax.cond`, since the sampling
    loop keeps the model's state after it.
    """

    @property
    def name(self) -> str:
        """Return the name in error messages."""
        return type(self).__name__

    @property
    def stochastic(self) -> bool:
        """Return whether a step needs noise."""
        return False

    def check(self, process: Process) -> None:  # noqa: B027 (most serve every process)
        """Check that the solver can follow a process.

        Raises:
          UserError: If it can't; the message names solvers that can.
        """

    @abstractmethod
    def init(self, noisy: Values, *, steps: int) -> Any:
        """Return the state before the first of `steps` steps; its `x` is the sample."""

    @abstractmethod
    def step(self, estimate: Estimator, process: Process, state: Any, interval: StepInterval) -> Any:
        """Return the state after one step."""


class SolverState(NamedTuple):
    """The state of a one-step solver."""

    x: Values


class OneStepSolver(Solver):
    """A solver without memory of earlier steps."""

    def init(self, noisy: Values, *, steps: int) -> SolverState:
        return SolverState(noisy)


@dataclass(frozen=True, kw_only=True)
class Euler(OneStepSolver):
    """First order, with one evaluation per step. For every process it is DDIM without noise (arXiv 2010.02502)."""

    def step(self, estimate: Estimator, process: Process, state: SolverState, interval: StepInterval) -> SolverState:
        """Combine the estimated data and noise in the proportions of the next time."""
        prediction = estimate(state.x, interval.time)
        return SolverState(process.add_noise(prediction.data, prediction.noise, interval.next_time))


@dataclass(frozen=True, kw_only=True)
class Heun(OneStepSolver):
    """Second order: the mean of the slopes at both ends of a step in `flow_coordinates`; two evaluations per step.

    A step to the data is Euler's, since few models predict the noise in data without noise.
    """

    def check(self, process: Process) -> None:
        """Check that alpha is not 0 at time 1."""
        with jax.ensure_compile_time_eval():
            is_finite = bool(jnp.isfinite(process.flow_coordinates(jnp.ones(())).integration_time))
        if not is_finite:
            raise UserError(
                f"solver heun is invalid: it solves {type(process).__name__} in x / alpha, and alpha is 0 at its "
                "noise. Use euler, ddim, dpm++2m or unipc."
            )

    def step(self, estimate: Estimator, process: Process, state: SolverState, interval: StepInterval) -> SolverState:
        """Apply the explicit trapezoidal rule (arXiv 2206.00364, algorithm 1)."""
        start, end = process.flow_coordinates(interval.time), process.flow_coordinates(interval.next_time)
        x, length = state.x / start.scale, end.integration_time - start.integration_time
        slope = process.flow_slope(estimate(state.x, interval.time))
        proposal = end.scale * (x + length * slope)

        def corrected() -> Array:
            next_slope = process.flow_slope(estimate(proposal, interval.next_time))
            return end.scale * (x + length * (slope + next_slope) / 2)

        return SolverState(jax.lax.cond(interval.next_time == 0, lambda: proposal, corrected))
