"""A solver that is watched: what a program needs to know of a run that it does for somebody else."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dit_video.diffusion.predictions import Estimator
from dit_video.diffusion.processes.process import Process
from dit_video.diffusion.samplers.solvers import Interval, SolverOf


class Trace(NamedTuple):
    """What a run went through."""

    x: Float[Array, "steps *shape"]
    """the sample after each step"""
    data: Float[Array, "steps *shape"]
    """as they were estimated at the start of each"""


class WatchedState(NamedTuple):
    """The solver's own, and what was seen."""

    solver: Any
    done: Int[Array, ""]
    """steps"""
    failed: Int[Array, ""]
    """number of the first step, from 0 on, after which a value was not finite; -1 if there was none"""
    recorded: Trace | None

    @property
    def x(self) -> Float[Array, "*shape"]:
        """The sample."""
        return self.solver.x


@dataclass(frozen=True, kw_only=True)
class Watched(SolverOf):
    """Another solver, but for three things.

    An interval of no length is no step, and costs nothing: times may be padded by their last, so that one program
    serves several numbers of steps. The first step that gives a value which is not finite is noted. All states are
    `recorded`, where that is asked for.
    """

    recorded: bool = False

    def init(self, noisy: Float[Array, "*shape"], *, steps: int) -> WatchedState:
        """Before the first of `steps` steps, those of no length not counted."""
        recorded = None
        if self.recorded:
            recorded = Trace(*(jnp.zeros((steps, *noisy.shape), noisy.dtype) for _ in range(2)))
        return WatchedState(
            solver=self.solver.init(noisy, steps=steps),
            done=jnp.zeros((), jnp.int32),
            failed=jnp.full((), -1, jnp.int32),
            recorded=recorded,
        )

    def step(self, estimate: Estimator, process: Process, state: WatchedState, interval: Interval) -> WatchedState:
        """The solver's, if the interval has a length."""
        return jax.lax.cond(
            interval.time != interval.following,
            lambda: self._step(estimate, process, state, interval),
            lambda: state,
        )

    def _step(self, estimate: Estimator, process: Process, state: WatchedState, interval: Interval) -> WatchedState:
        found = []

        def noted(noisy, time, *past):
            found.append(estimate(noisy, time, *past))
            return found[-1]

        following = self.solver.step(noted, process, state.solver, interval)
        recorded = state.recorded
        if recorded is not None:
            recorded = Trace(
                recorded.x.at[state.done].set(following.x), recorded.data.at[state.done].set(found[0].data)
            )
        wrong = (state.failed < 0) & ~jnp.isfinite(following.x).all(axis=None)
        return WatchedState(following, state.done + 1, jnp.where(wrong, state.done, state.failed), recorded)
