"""What a solver is, and the solvers of one step without noise: what they carry is the sample alone."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dit_video.core.errors import UserError
from dit_video.diffusion.predictions import Estimator
from dit_video.diffusion.processes.process import Process


class Interval(NamedTuple):
    """One step."""

    time: Float[Array, ""]
    following: Float[Array, ""]
    noise: Float[Array, "*shape"] | None = None
    """standard normal, of this step alone"""


class Solver(ABC):
    """From noise to data in steps, one interval of the times each; its `estimate` is asked at the ends of intervals."""

    @property
    def name(self) -> str:
        """As errors say it."""
        return type(self).__name__

    @property
    def stochastic(self) -> bool:
        """Whether a step needs noise."""
        return False

    def check(self, process: Process) -> None:  # noqa: B027 (most serve every process)
        """Whether it can follow a process.

        Raises:
          UserError: it can't; the sentence names what can.
        """

    @abstractmethod
    def init(self, noisy: Float[Array, "*shape"], *, steps: int) -> Any:
        """Before the first of `steps` steps: a state, whose `x` is the sample."""

    @abstractmethod
    def step(self, estimate: Estimator, process: Process, state: Any, interval: Interval) -> Any:
        """The state after one step."""


@dataclass(frozen=True, kw_only=True)
class SolverOf(Solver):
    """Another solver, with something beside it: it has its name, its noise and its processes."""

    solver: Solver

    @property
    def name(self) -> str:
        return self.solver.name

    @property
    def stochastic(self) -> bool:
        return self.solver.stochastic

    def check(self, process: Process) -> None:
        self.solver.check(process)


class SolverState(NamedTuple):
    """What a one-step solver carries."""

    x: Float[Array, "*shape"]


class OneStep(Solver):
    """A solver that remembers nothing of earlier steps."""

    def init(self, noisy: Float[Array, "*shape"], *, steps: int) -> SolverState:
        return SolverState(noisy)


@dataclass(frozen=True, kw_only=True)
class Euler(OneStep):
    """First order: one evaluation a step. Of any process it is DDIM without noise (arXiv 2010.02502)."""

    def step(self, estimate: Estimator, process: Process, state: SolverState, interval: Interval) -> SolverState:
        """The data and the noise as they are estimated, in the proportions of the following time."""
        found = estimate(state.x, interval.time)
        return SolverState(process.add_noise(found.data, found.noise, interval.following))


@dataclass(frozen=True, kw_only=True)
class Heun(OneStep):
    """Second order: the slope of the process's `path` averaged over both ends of the step; two evaluations a step.

    A step to the data is Euler's: of data without noise, few models say what the noise is.
    """

    def check(self, process: Process) -> None:
        with jax.ensure_compile_time_eval():
            finite = bool(jnp.isfinite(process.path(jnp.ones(())).clock))
        if not finite:
            raise UserError(
                f"heun solves {type(process).__name__} in x / alpha, and alpha is 0 at its noise; "
                "use euler, ddim, dpm++2m or unipc"
            )

    def step(self, estimate: Estimator, process: Process, state: SolverState, interval: Interval) -> SolverState:
        """The explicit trapezoidal rule (arXiv 2206.00364, algorithm 1)."""
        here, there = process.path(interval.time), process.path(interval.following)
        x, change = state.x / here.scale, there.clock - here.clock
        slope = process.slope(estimate(state.x, interval.time))
        proposal = there.scale * (x + change * slope)

        def corrected() -> Array:
            second = process.slope(estimate(proposal, interval.following))
            return there.scale * (x + change * (slope + second) / 2)

        return SolverState(jax.lax.cond(interval.following == 0, lambda: proposal, corrected))
