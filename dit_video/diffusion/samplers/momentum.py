"""A solver whose state includes the momentum of guidance from earlier steps."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp

from dit_video.diffusion.predictions import Estimator
from dit_video.diffusion.processes.process import Process, Values
from dit_video.diffusion.samplers.solvers import SolverWrapper, StepInterval


class RememberingState(NamedTuple):
    """The wrapped solver's state, and the past that guidance carries from step to step."""

    solver: Any
    past: Values

    @property
    def x(self) -> Values:
        """Return the sample."""
        return self.solver.x


@dataclass(frozen=True, kw_only=True)
class Remembering(SolverWrapper):
    """A wrapper of a solver for a `denoise(noisy, time, past)` that returns a prediction and the next past.

    All evaluations within a step get the same past. The past returned by the first one is kept, so that a solver with
    two evaluations per step also keeps one value per step.
    """

    def init(self, noisy: Values, *, steps: int) -> RememberingState:
        """Return the state before the first of `steps` steps, with a past of zeros."""
        return RememberingState(self.solver.init(noisy, steps=steps), jnp.zeros_like(noisy))

    def step(
        self, estimate: Estimator, process: Process, state: RememberingState, interval: StepInterval
    ) -> RememberingState:
        """Take a step of the wrapped solver."""
        estimates = []

        def estimate_with_past(noisy, time):
            estimates.append(estimate(noisy, time, state.past))
            return estimates[-1]

        solver_state = self.solver.step(estimate_with_past, process, state.solver, interval)
        assert estimates[0].past is not None, "a denoise that takes a past returns one"
        return RememberingState(solver_state, estimates[0].past)
