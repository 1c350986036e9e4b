"""Samplers: solvers of the reverse process, from noise to data."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from dit_video.core.errors import UserError
from dit_video.core.registry import find_named
from dit_video.diffusion.objective import (
    DenoiseFn,
    Estimator,
    Prediction,
    V,
    Velocity,
    estimate_with_state,
    predicts_data,
)
from dit_video.diffusion.processes import Estimate, Process, Values


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
    def stochastic(self) -> bool:
        """Return True if a step needs noise."""
        return False

    def check(self, process: Process) -> None:  # noqa: B027 (most serve every process)
        """Check that the solver can follow a process.

        Raises:
          UserError: If the solver can't follow the process; the message names solvers that can.
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


NoiseFn = Callable[[Int[Array, ""]], Values]
"""Standard normal noise of a step in the shape of the sample, by the step's number from 0 on."""

TransformFn = Callable[[Values, Float[Array, ""], Int[Array, ""]], Values]
"""Function that changes the sample after a step, given the sample, its time and the step's number."""


def make_noise_fn(keys: Key[Array, " B"], shape: tuple[int, ...]) -> NoiseFn:
    """Return a function that draws each sample's noise with its own key, independent of the rest of the batch.

    Args:
      keys: One key per sample, used for nothing else.
      shape: Shape of one sample, without the batch axis.
    """
    return lambda number: jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, number), shape))(keys)


class Trace(NamedTuple):
    """The trajectory of a sampling run."""

    x: Float[Array, "steps *shape"]
    """The sample after each step."""
    data: Float[Array, "steps *shape"]
    """The data estimated at the start of each step."""


class SamplingState(NamedTuple):
    """All that sampling carries from step to step."""

    solver: Any
    """State of the solver."""
    denoiser: Any
    """State of `denoise`; None if it has none."""
    steps_done: Int[Array, ""]
    """Number of completed steps."""
    failed_step: Int[Array, ""]
    """Number of the first step, from 0 on, after which a value was not finite; -1 if there is none."""
    trace: Trace | None
    """Trajectory so far; None if it is not kept."""

    @property
    def x(self) -> Values:
        """Return the sample."""
        return self.solver.x


def init_sampling(
    solver: Solver, noisy: Values, *, steps: int, denoiser: Any = None, has_trace: bool = False
) -> SamplingState:
    """Return the state before the first of `steps` steps, not counting steps of length 0.

    Args:
      solver: The solver.
      noisy: The sample to start from, such as `process.scale_initial_noise(noise)`.
      steps: Number of steps.
      denoiser: Initial state of `denoise`.
      has_trace: Keeps all intermediate results, in arrays for `steps` steps.
    """
    trace = Trace(*(jnp.zeros((steps, *noisy.shape), noisy.dtype) for _ in range(2))) if has_trace else None
    done, failed = jnp.zeros((), jnp.int32), jnp.full((), -1, jnp.int32)
    return SamplingState(solver.init(noisy, steps=steps), denoiser, done, failed, trace)


def sample(
    denoise: DenoiseFn,
    noise: Values,
    times: Float[Array, " times"],
    *,
    process: Process,
    solver: Solver,
    prediction: Prediction = Velocity(),  # noqa: B008 (a value)
    model_times: Float[Array, " times"] | None = None,
    noise_fn: NoiseFn | None = None,
    state: Any = None,
) -> Values:
    """Run `solver` over the intervals of `times`, from noise to data. `denoise` gets the time as a scalar.

    Args:
      denoise: The model.
      noise: Standard normal noise.
      times: Falling times; see `time_schedules`.
      process: The process that the model was trained on.
      solver: The solver of the probability flow or of the reverse process.
      prediction: The kind of the model's prediction.
      model_times: The time that the model receives at each of `times`, if it differs.
      noise_fn: The noise of each step for a stochastic solver; see `make_noise_fn`.
      state: Initial state of `denoise`.

    Raises:
      UserError: If a stochastic solver gets no noise, or the solver can't follow the process.
    """
    start = init_sampling(solver, process.scale_initial_noise(noise), steps=times.shape[0] - 1, denoiser=state)
    options: dict[str, Any] = {"prediction": prediction, "model_times": model_times, "noise_fn": noise_fn}
    return advance(denoise, start, times, process=process, solver=solver, **options).x


def trace(
    denoise: DenoiseFn,
    noise: Values,
    times: Float[Array, " times"],
    *,
    process: Process,
    solver: Solver,
    prediction: Prediction = Velocity(),  # noqa: B008 (a value)
    model_times: Float[Array, " times"] | None = None,
    noise_fn: NoiseFn | None = None,
    state: Any = None,
) -> Trace:
    """Run `sample` and return all intermediate results; `x[-1]` of the trace is the sample.

    Arguments and errors are those of `sample`.
    """
    start = init_sampling(
        solver, process.scale_initial_noise(noise), steps=times.shape[0] - 1, denoiser=state, has_trace=True
    )
    options: dict[str, Any] = {"prediction": prediction, "model_times": model_times, "noise_fn": noise_fn}
    result = advance(denoise, start, times, process=process, solver=solver, **options).trace
    assert result is not None, "the initial state has a trace"
    return result


def advance(
    denoise: DenoiseFn,
    state: SamplingState,
    times: Float[Array, " times"],
    *,
    process: Process,
    solver: Solver,
    prediction: Prediction = Velocity(),  # noqa: B008 (a value)
    model_times: Float[Array, " times"] | None = None,
    noise_fn: NoiseFn | None = None,
    first_step: Int[Array, ""] | int = 0,
    transform: TransformFn | None = None,
) -> SamplingState:
    """Advance sampling to the last of `times`; arguments are as for `sample`.

    Consecutive calls are equivalent to a single one, even with different models: the state knows the number of steps,
    and `first_step` is the number of the first step of this call. Steps of length 0 are skipped and cost nothing, so
    times may be padded with the last one to let one program serve several numbers of steps.

    `transform` changes the sample after each step. It also changes the estimated data in the trace, as if at time 0.
    """
    solver.check(process)
    if solver.stochastic and noise_fn is None:
        raise UserError(
            f"noise_fn=None is invalid: {type(solver).__name__} draws noise. Use make_noise_fn(keys, shape)."
        )
    model_times = times if model_times is None else model_times

    def take_step(state: SamplingState, index: Array) -> SamplingState:
        time, next_time, number = times[index], times[index + 1], first_step + index
        evaluations: list[tuple[Estimate, Any]] = []

        def estimate(noisy: Values, end: Array) -> Estimate:
            model_time, next_model_time = model_times[index], model_times[index + 1]
            passed = jnp.where(end == next_time, 1.0, (time - end) / (time - next_time))
            model_time = (1 - passed) * model_time + passed * next_model_time
            model = lambda noisy, _, state: denoise(noisy, model_time, state)  # noqa: E731
            evaluations.append(estimate_with_state(model, process, prediction, noisy, end, state.denoiser))
            return evaluations[-1][0]

        noise = noise_fn(number) if noise_fn is not None and solver.stochastic else None
        solver_state = solver.step(estimate, process, state.solver, StepInterval(time, next_time, noise))
        first, denoiser_state = evaluations[0]
        data = first.data
        if transform is not None:
            solver_state = solver_state._replace(x=transform(solver_state.x, next_time, number))
            data = transform(data, jnp.zeros_like(next_time), number)
        step, trace = state.steps_done, state.trace
        if trace is not None:
            trace = Trace(trace.x.at[step].set(solver_state.x), trace.data.at[step].set(data))
        is_first_failure = (state.failed_step < 0) & ~jnp.isfinite(solver_state.x).all(axis=None)
        failed_step = jnp.where(is_first_failure, step, state.failed_step)
        return SamplingState(solver_state, denoiser_state, step + 1, failed_step, trace)

    def step(state, index):
        is_empty = times[index] == times[index + 1]
        return jax.lax.cond(is_empty, lambda: state, lambda: take_step(state, index)), None

    return jax.lax.scan(step, state, jnp.arange(times.shape[0] - 1))[0]


@dataclass(frozen=True, kw_only=True)
class Euler(OneStepSolver):
    """First order, with one evaluation per step. It is DDIM without noise for every process (arXiv 2010.02502)."""

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
        slope = process.flow_slope(estimate(state.x, interval.time))
        proposal = process.follow(state.x, slope, interval.time, interval.next_time)

        def corrected() -> Array:
            next_slope = process.flow_slope(estimate(proposal, interval.next_time))
            return process.follow(state.x, (slope + next_slope) / 2, interval.time, interval.next_time)

        return SolverState(jax.lax.cond(interval.next_time == 0, lambda: proposal, corrected))


_MIN_VARIANCE = 1e-20
"""Lower bound of variances before their logarithm is taken."""


@dataclass(frozen=True, kw_only=True)
class Ddim(OneStepSolver):
    """DDIM; the fresh noise has `eta` times the standard deviation of the posterior (arXiv 2010.02502, eq. 12, 16).

    It is Euler's method with `eta` 0, and ancestral sampling with 1. A larger eta adds more noise than DDPM, up to the
    noise level of the next time, where all noise is fresh.

    Raises:
      UserError: If eta is negative.
    """

    eta: float = 0.0

    def __post_init__(self):
        if not 0 <= self.eta < float("inf"):
            raise UserError(f"eta={self.eta} is invalid: must be finite and >= 0. Use 0 for no noise, 1 for DDPM's.")

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def step(self, estimate: Estimator, process: Process, state: SolverState, interval: StepInterval) -> SolverState:
        """Combine the estimated data, the estimated noise and fresh noise."""
        prediction = estimate(state.x, interval.time)
        if not self.stochastic:
            return SolverState(process.add_noise(prediction.data, prediction.noise, interval.next_time))
        sigma = process.sigma(interval.next_time)
        variance = process.posterior(state.x, prediction.data, interval.time, interval.next_time).variance
        fresh = jnp.minimum(self.eta * jnp.sqrt(variance), sigma)
        remaining = jnp.sqrt(jnp.maximum(sigma**2 - fresh**2, 0.0))
        alpha = process.alpha(interval.next_time)
        return SolverState(alpha * prediction.data + remaining * prediction.noise + fresh * _get_noise(interval))


@dataclass(frozen=True, kw_only=True)
class Ddpm(OneStepSolver):
    """A sample from the posterior at the estimated data (arXiv 2006.11239, algorithm 2).

    Its variance is the posterior's (`small`, exact if the data are a single point), or the variance of the noise added
    between the two times (`large`, exact if the data are standard normal). A model that predicts the variance
    interpolates between the two in logarithms (arXiv 2102.09672, eq. 15). The last step, to the data, adds no noise.
    """

    variance: Literal["small", "large"] = "small"

    @property
    def stochastic(self) -> bool:
        return True

    def step(self, estimate: Estimator, process: Process, state: SolverState, interval: StepInterval) -> SolverState:
        """Draw a sample from the posterior."""
        time, next_time, _ = interval
        prediction = estimate(state.x, time)
        mean, small = process.posterior(state.x, prediction.data, time, next_time)
        large = process.added_variance(time, next_time)
        if prediction.variance is not None:
            low, high = (jnp.log(jnp.maximum(bound, _MIN_VARIANCE)) for bound in (small, large))
            variance = jnp.exp(prediction.variance * high + (1 - prediction.variance) * low)
        else:
            variance = small if self.variance == "small" else large
        return SolverState(mean + jnp.where(next_time == 0, 0.0, jnp.sqrt(variance)) * _get_noise(interval))


@dataclass(frozen=True, kw_only=True)
class Lcm(OneStepSolver):
    r"""The sampler of a consistency model: jumps to the data, then returns to the next time with fresh noise only.

    The data are $c_{skip} x + c_{out} \hat x_0$ with $c_{skip} = d^2 / (u^2 + d^2)$ and
    $c_{out} = u / \sqrt{u^2 + d^2}$, where $d$ is `data_std` and $u$ is `scaling` times the time, so that at time 0
    they are $x$ itself (arXiv 2303.01469, algorithm 1; 2310.04378, algorithm 3). With `scaling` None they are
    $\hat x_0$, as for a distilled flow (`stochastic_sampling` of diffusers). It is a poor sampler for models that were
    not distilled.

    Raises:
      UserError: If `scaling` or `data_std` is not positive.
    """

    scaling: float | None = 10_000.0
    data_std: float = 0.5

    def __post_init__(self):
        if not min(1 if self.scaling is None else self.scaling, self.data_std) > 0:
            raise UserError(f"{self} is invalid: both must be positive. Use the defaults 10000 and 0.5.")

    @property
    def stochastic(self) -> bool:
        return True

    def step(self, estimate: Estimator, process: Process, state: SolverState, interval: StepInterval) -> SolverState:
        """Estimate the data and add fresh noise for the next time."""
        data = estimate(state.x, interval.time).data
        if self.scaling is not None:
            scaled = self.scaling * interval.time
            size = scaled**2 + self.data_std**2
            data = self.data_std**2 / size * state.x + scaled / jnp.sqrt(size) * data
        return SolverState(process.add_noise(data, _get_noise(interval), interval.next_time))


def _get_noise(interval: StepInterval) -> Values:
    assert interval.noise is not None, "the sampling loop passes noise to stochastic solvers"
    return interval.noise


DpmKind = Literal["midpoint", "heun"]

_LOWER_ORDER_STEP_LIMIT = 15
"""Number of steps below which a last step of first order is more stable."""


class DpmState(NamedTuple):
    """The state of `DpmMultistep` and `DpmSinglestep`."""

    x: Values
    """The current sample."""
    start_x: Values
    """The sample at the start of the last step."""
    data: Values
    """The data estimated at the start of the last step."""
    time: Float[Array, ""]
    """The time at the start of the last step."""
    steps_done: Int[Array, ""]
    """Number of completed steps."""
    steps_left: Int[Array, ""]
    """Number of remaining steps."""


class _DpmSolver(Solver):
    def init(self, noisy: Values, *, steps: int) -> DpmState:
        nothing = jnp.zeros((), jnp.int32)
        return DpmState(noisy, noisy, jnp.zeros_like(noisy), jnp.ones(()), nothing, nothing + steps)


@dataclass(frozen=True, kw_only=True)
class DpmMultistep(_DpmSolver):
    """DPM-Solver++(2M), or its SDE form with `eta` 1; one evaluation per step.

    The estimated data follow the line through this and the previous evaluation. The first step is of first order. So
    are the step after one from pure noise, and a step to time 0, because the log-SNR is infinite at these times.

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
        x = _advance_dpm(process, state.x, interval, data, rise, self.kind, self.eta)
        return DpmState(x, state.x, data, time.astype(state.time.dtype), state.steps_done + 1, state.steps_left - 1)


@dataclass(frozen=True, kw_only=True)
class DpmSinglestep(_DpmSolver):
    """DPM-Solver++(2S): a step spans two intervals and evaluates at the time between them; one evaluation per interval.

    The first interval is a first-order step to the midpoint. The second interval restarts from the step's start, now
    along the line through both evaluations. A last interval without a second one is of first order, and so is an
    interval to time 0.
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
        x = _advance_dpm(process, start, StepInterval(start_time, next_time), start_data, rise, self.kind, 0.0)
        return DpmState(x, start, start_data, start_time, state.steps_done + 1, state.steps_left - 1)


def _advance_dpm(
    process: Process, x: Values, interval: StepInterval, data: Values, rise: Values, kind: DpmKind, eta: float
) -> Values:
    """Return the sample at the interval's end if the estimated data change by `rise` over the interval."""
    time, next_time, noise = interval
    alpha, sigma, h = process.alpha(next_time), process.sigma(next_time), _compute_length(process, time, next_time)
    rate = 1 + eta**2
    share = -jnp.expm1(-rate * h)
    slope_term = alpha * (share / 2 if kind == "midpoint" else 1 - share / (rate * h)) * rise
    deterministic = sigma / process.sigma(time) * x + alpha * share * data + slope_term
    if eta == 0:
        return deterministic
    assert noise is not None, "the sampling loop passes noise to stochastic solvers"
    # The solution scales `x` by e^{-eta^2 h}; `deterministic` has the factor 1, as for eta=0. Nothing is left of pure
    # noise, where h is infinite, although `half_log_snr` is bounded.
    decay = sigma / process.sigma(time) * jnp.where(process.alpha(time) == 0, -1.0, jnp.expm1(-(eta**2) * h)) * x
    return deterministic + decay + sigma * jnp.sqrt(-jnp.expm1(-2 * eta**2 * h)) * noise


def _compute_length(process: Process, time: Float[Array, ""], next_time: Float[Array, ""]) -> Float[Array, ""]:
    """Return $h$, the difference of log-SNRs between two times."""
    return process.half_log_snr(next_time) - process.half_log_snr(time)


class UniPcState(NamedTuple):
    """The state of UniPC, with the `M` latest evaluations, the newest first."""

    x: Values
    """The current (predicted) sample."""
    start_x: Values
    """The (corrected) sample at the start of the last step."""
    predictions: Float[Array, "M *shape"]
    """Predictions of the data."""
    times: Float[Array, " M"]
    """Times of the predictions."""
    steps_done: Int[Array, ""]
    """Number of completed steps."""
    steps_left: Int[Array, ""]
    """Number of remaining steps."""
    order: Int[Array, ""]
    """Order of the last step."""


@dataclass(frozen=True, kw_only=True)
class UniPc(Solver):
    """UniPC with one evaluation per step; its accuracy with the corrector is of order `order` + 1.

    The first steps, which have no past yet, are of a lower order. So is a step to time 0, where the log-SNR is
    infinite; its result is the model's prediction of the data.

    Raises:
      UserError: If the order is not 1, 2 or 3.
    """

    order: int = 2
    """Order of the predictor."""
    kind: Literal["bh1", "bh2"] = "bh2"
    """Form of the paper's $B(h)$, `solver_type` of diffusers: `bh1` is linear in $h$, `bh2` exponential."""
    lower_order_final: bool = True
    """Lowers the order of the last steps to ..., 2, 1, which is more stable with few steps."""
    uncorrected_steps: tuple[int, ...] = ()
    """Steps, counted from 0, whose result is not corrected."""

    def __post_init__(self):
        if self.order not in (1, 2, 3):
            raise UserError(f"order={self.order} is invalid: UniPC has order 1, 2 or 3, not {self.order}. Use 2.")

    def init(self, noisy: Values, *, steps: int) -> UniPcState:
        """Return the state before the first of `steps` steps."""
        zero = jnp.zeros((), jnp.int32)
        return UniPcState(
            x=noisy,
            start_x=noisy,
            predictions=jnp.zeros((self.order, *noisy.shape), noisy.dtype),
            times=jnp.ones((self.order,)),
            steps_done=zero,
            steps_left=zero + steps,
            order=zero,
        )

    def step(self, estimate: Estimator, process: Process, state: UniPcState, interval: StepInterval) -> UniPcState:
        """Evaluate at `x`, correct `x` by the result, and predict the sample at the next time."""
        extrapolate = partial(_advance_unipc, process, self.kind)
        time, next_time = interval.time, interval.next_time
        prediction = estimate(state.x, time).data

        def make_corrector(order: int) -> Callable[[], Array]:
            indices = range(1, order)
            nodes = [time, *(state.times[k] for k in indices)]
            values = [prediction, *(state.predictions[k] for k in indices)]
            return lambda: extrapolate(state.start_x, state.times[0], time, state.predictions[0], nodes, values)

        orders = range(1, self.order + 1)
        is_uncorrected = jnp.isin(state.steps_done - 1, jnp.asarray(self.uncorrected_steps, jnp.int32))
        x = jax.lax.switch(jnp.where(is_uncorrected, 0, state.order), [lambda: state.x, *map(make_corrector, orders)])

        predictions = jnp.concatenate([prediction[None], state.predictions[:-1]])
        times = jnp.concatenate([jnp.reshape(time, (1,)).astype(state.times.dtype), state.times[:-1]])

        def make_predictor(order: int) -> Callable[[], Array]:
            indices = range(1, order)
            nodes, values = [times[k] for k in indices], [predictions[k] for k in indices]
            return lambda: extrapolate(x, time, next_time, prediction, nodes, values)

        order = jnp.minimum(self.order, state.steps_done + 1)
        if self.lower_order_final:
            order = jnp.minimum(order, state.steps_left)
        order = jnp.where(next_time == 0, 1, order)
        return UniPcState(
            x=jax.lax.switch(order - 1, [make_predictor(number) for number in orders]),
            start_x=x,
            predictions=predictions,
            times=times,
            steps_done=state.steps_done + 1,
            steps_left=state.steps_left - 1,
            order=order,
        )


def _advance_unipc(
    process: Process,
    kind: str,
    x: Values,
    start: Float[Array, ""],
    end: Float[Array, ""],
    prediction: Values,
    nodes: Sequence[Float[Array, ""]],
    values: Sequence[Values],
) -> Values:
    """Return the sample at `end`, from `x` and its prediction at `start` and the predictions `values` at `nodes`."""
    h = process.half_log_snr(end) - process.half_log_snr(start)
    change = jnp.expm1(-h) * prediction
    if nodes:
        ratios = [(process.half_log_snr(node) - process.half_log_snr(start)) / h for node in nodes]
        for weight, ratio, value in zip(_compute_weights(kind, h, ratios), ratios, values, strict=True):
            change = change + weight * (value - prediction) / ratio
    return process.sigma(end) / process.sigma(start) * x - process.alpha(end) * change


def _compute_weights(kind: str, h: Float[Array, ""], ratios: Sequence[Float[Array, ""]]) -> list[Float[Array, ""]]:
    """Return the weight of each node's difference quotient.

    With several nodes, the weight of a node is the sum of the moments over the powers of its Lagrange polynomial, which
    is 1 at this node and 0 at the others.
    """
    if len(ratios) == 1:
        return [(-h if kind == "bh1" else jnp.expm1(-h)) / 2]
    moments, factorial, term = [], 1, jnp.expm1(-h)
    for index in range(1, len(ratios) + 1):
        factorial *= index
        term = term / -h - 1 / factorial
        moments.append(factorial * term)
    weights = []
    for node in ratios:
        powers = [jnp.ones_like(h)]  # Coefficients of the polynomial, the lowest power first.
        for other in (ratio for ratio in ratios if ratio is not node):
            zero, scale = jnp.zeros_like(h), node - other
            terms = zip([zero, *powers], [*powers, zero], strict=True)
            powers = [(shifted - other * unshifted) / scale for shifted, unshifted in terms]
        weights.append(jnp.stack([power * moment for power, moment in zip(powers, moments, strict=True)]).sum(axis=0))
    return weights


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
    """Number of completed steps."""


@dataclass(frozen=True, kw_only=True)
class Pndm(Solver):
    """PNDM, for uniformly spaced times: one evaluation per step after the start.

    A starting step to the data makes no evaluation at its end, since few models predict the noise in data without
    noise.

    Raises:
      UserError: If there are no training steps.
    """

    start: Literal["heun", "runge-kutta"] = "heun"
    """Steps that have no past evaluations yet: one step with the mean of two evaluations (PLMS, the sampler of Stable
    Diffusion), or three steps with four each (the paper's)."""
    value: Literal["slope", "v"] = "slope"
    """Value that is combined: `slope` is the slope in `Process.flow_coordinates`, which is the noise, or the velocity
    of a flow; `v` is the v prediction, which diffusers uses for models that make one, and with which the method is only
    of first order."""
    training_steps: int | None = None
    """Number of the model's noise steps, to which the midpoints of Runge-Kutta steps are rounded; None for models with
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
            # If the midpoint lies between two noise steps, diffusers moves to one of them and evaluates at the other.
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
        return process.follow(x, value, time, end)

    def _find_middle(
        self, time: Float[Array, ""], next_time: Float[Array, ""]
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Return the midpoint, rounded down and up to noise steps."""
        middle = (time + next_time) / 2
        if self.training_steps is None:
            return middle, middle
        # The margins serve times that are steps up to rounding.
        step = middle * self.training_steps
        return jnp.floor(step + 1e-3) / self.training_steps, jnp.ceil(step - 1e-3) / self.training_steps


SOLVERS: dict[str, Solver] = {
    "ddim": Ddim(),
    "ddpm": Ddpm(),
    "dpm++2m": DpmMultistep(),
    "dpm++2s": DpmSinglestep(),
    "dpm++sde": DpmMultistep(eta=1.0),
    "euler": Euler(),
    "euler-ancestral": Ddim(eta=1.0),
    "heun": Heun(),
    "lcm": Lcm(),
    "pndm": Pndm(),
    "unipc": UniPc(),
}


def get_solver(name: str) -> Solver:
    """Return the solver with this name.

    Raises:
      UserError: If no solver has this name.
    """
    if (solver := find_named(SOLVERS, name)) is None:
        raise UserError(f"unknown solver {name!r}; use one of {', '.join(sorted(SOLVERS))}")
    return solver


class Inversion(NamedTuple):
    """The noise of inverted data, and how well it reconstructs them."""

    noise: Float[Array, "B *shape"]
    """Noise that `sample` starts from, standard normal if the model is exact."""
    data: Float[Array, "B *shape"]
    """Data sampled from that noise, with the same solver at the same times."""
    error: Float[Array, " B"]
    """Root mean square error of each sample's reconstruction."""


def invert(
    denoise: DenoiseFn,
    data: Float[Array, "B *shape"],
    times: Float[Array, " times"],
    *,
    process: Process,
    solver: Solver = Euler(),
    prediction: Prediction = Velocity(),  # noqa: B008 (a value)
    model_times: Float[Array, " times"] | None = None,
) -> Inversion:
    """Return the noise of data, and the data sampled from that noise, at twice the cost of sampling.

    The inverse step is not exact, as it evaluates the model at its own start, which is the end of the sampling step.
    The error falls with the number of steps at the solver's order.

    Args:
      denoise: The model, without state and with little or no guidance: guidance has no invertible flow.
      data: The data to invert.
      times: Times that rise from 0 to 1, such as a reversed time schedule.
      process: The process that the model was trained on.
      solver: A deterministic one-step solver.
      prediction: The kind of the model's prediction.
      model_times: The time that the model receives at each of `times`, if it differs.

    Raises:
      UserError: If the solver is stochastic or multistep, or the prediction does not determine the noise at time 0.
    """
    if not isinstance(solver, Euler | Heun | Ddim) or solver.stochastic:
        raise UserError(f"solver={solver} is invalid: can't be run towards noise. Use euler, heun or ddim without eta.")
    if predicts_data(prediction):
        raise UserError(
            f"prediction={prediction} is invalid: at time 0, where inversion starts, it does not determine the noise. "
            "Use a model with another prediction."
        )
    start = init_sampling(solver, data, steps=times.shape[0] - 1)
    end = advance(denoise, start, times, process=process, solver=solver, prediction=prediction, model_times=model_times)
    noise = end.x / process.scale_initial_noise(jnp.ones(()))
    falling = None if model_times is None else model_times[::-1]
    reconstruction = sample(
        denoise, noise, times[::-1], process=process, solver=solver, prediction=prediction, model_times=falling
    )
    error = jnp.sqrt(jnp.square(reconstruction - data).mean(axis=tuple(range(1, data.ndim))))
    return Inversion(noise, reconstruction, error)
