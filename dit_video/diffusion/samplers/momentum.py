"""A solver for a model that remembers: what guidance with momentum has of earlier steps is part of the state."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from dit_video.diffusion.predictions import Estimator
from dit_video.diffusion.processes.process import Process
from dit_video.diffusion.samplers.solvers import Interval, SolverOf


class RememberingState(NamedTuple):
    """The solver's own, and what the model made of the past."""

    solver: Any
    past: Float[Array, "*shape"]

    @property
    def x(self) -> Float[Array, "*shape"]:
        """The sample."""
        return self.solver.x


@dataclass(frozen=True, kw_only=True)
class Remembering(SolverOf):
    """Another solver, of a `denoise(noisy, time, past)` that gives its prediction and the past of the next step.

    All evaluations of a step see one past; the first of them is what is remembered, so that a solver with two of them
    remembers one value a step too.
    """

    def init(self, noisy: Float[Array, "*shape"], *, steps: int) -> RememberingState:
        """Before the first of `steps` steps, with nothing to remember."""
        return RememberingState(self.solver.init(noisy, steps=steps), jnp.zeros_like(noisy))

    def step(
        self, estimate: Estimator, process: Process, state: RememberingState, interval: Interval
    ) -> RememberingState:
        """The solver's."""
        found = []

        def recalled(noisy, time):
            found.append(estimate(noisy, time, state.past))
            return found[-1]

        following = self.solver.step(recalled, process, state.solver, interval)
        assert found[0].past is not None, "of a denoise that is given a past"
        return RememberingState(following, found[0].past)
