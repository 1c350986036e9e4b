"""A solver wrapper that skips padded steps, records the first non-finite step, and optionally keeps the trajectory."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dit_video.diffusion.predictions import Estimator
from dit_video.diffusion.processes.process import Process, Values
from dit_video.diffusion.samplers.solvers import SolverWrapper, StepInterval


class Trace(NamedTuple):
    """The trajectory of a sampling run."""

    x: Float[Array, "steps *shape"]
    """The sample after each step."""
    data: Float[Array, "steps *shape"]
    """The data estimated at the start of each step."""


class TracedSamplerState(NamedTuple):
    """The wrapped solver's state, and what was recorded."""

    solver: Any
    steps_done: Int[Array, ""]
    """Number of steps that are done."""
    failed_step: Int[Array, ""]
    """Number of the first step, from 0 on, after which a value was not finite; -1 if there is none."""
    trace: Trace | None
    """Trajectory so far; None if it is not kept."""

    @property
    def x(self) -> Values:
        """Return the sample."""
        return self.solver.x


@dataclass(frozen=True, kw_only=True)
class TracedSampler(SolverWrapper):
    """A wrapper of a solver that skips steps of length 0, records the first non-finite one, and may keep a trace.

    Steps of length 0 cost nothing: times may be padded with their last one, so that one program serves several numbers
    of steps.
    """

    has_trace: bool = False
    """Keeps all states in a `Trace`."""

    def init(self, noisy: Values, *, steps: int) -> TracedSamplerState:
        """Return the state before the first of `steps` steps, not counting those of length 0."""
        trace = None
        if self.has_trace:
            trace = Trace(*(jnp.zeros((steps, *noisy.shape), noisy.dtype) for _ in range(2)))
        return TracedSamplerState(
            solver=self.solver.init(noisy, steps=steps),
            steps_done=jnp.zeros((), jnp.int32),
            failed_step=jnp.full((), -1, jnp.int32),
            trace=trace,
        )

    def step(
        self, estimate: Estimator, process: Process, state: TracedSamplerState, interval: StepInterval
    ) -> TracedSamplerState:
        """Take a step of the wrapped solver if the interval has a length."""
        time, next_time, _ = interval
        return jax.lax.cond(time != next_time, lambda: self._step(estimate, process, state, interval), lambda: state)

    def _step(
        self, estimate: Estimator, process: Process, state: TracedSamplerState, interval: StepInterval
    ) -> TracedSamplerState:
        estimates = []

        def estimate_and_record(noisy, time, *past):
            estimates.append(estimate(noisy, time, *past))
            return estimates[-1]

        solver_state = self.solver.step(estimate_and_record, process, state.solver, interval)
        step, trace = state.steps_done, state.trace
        if trace is not None:
            trace = Trace(trace.x.at[step].set(solver_state.x), trace.data.at[step].set(estimates[0].data))
        is_first_failure = (state.failed_step < 0) & ~jnp.isfinite(solver_state.x).all(axis=None)
        failed_step = jnp.where(is_first_failure, step, state.failed_step)
        return TracedSamplerState(solver_state, step + 1, failed_step, trace)
