r"""UniPC: a multistep predictor and corrector (arXiv 2302.04867).

With $\lambda = \log(\alpha / \sigma)$ the probability flow from time $s$ to $t$ is exactly

$$x_t = \frac{\sigma_t}{\sigma_s} x_s + \sigma_t \int_{\lambda_s}^{\lambda_t} e^\lambda\, \hat x_0(\lambda)\, d\lambda$$

where $\hat x_0$ is the model's prediction of the data. It is replaced by the polynomial through known values. With
$h = \lambda_t - \lambda_s$ and nodes $r_k = (\lambda_k - \lambda_s) / h$ this gives

$$x_t = \frac{\sigma_t}{\sigma_s} x_s - \alpha_t \Big((e^{-h} - 1)\, m_s + \sum_k w_k \frac{m_k - m_s}{r_k}\Big),
\qquad \sum_k r_k^{i-1} w_k = i!\, \phi_{i+1}(-h)\,(-h)$$

with $m$ the predictions. **The predictor's nodes are the past evaluations; the corrector has one more, the evaluation
at $t$ itself ($r = 1$)**, which the next step needs anyway: a step costs one evaluation. A single node takes
$w = B(h)/2$ instead, with $B(h) = -h$ (`bh1`) or $e^{-h} - 1$ (`bh2`); for more nodes $B$ cancels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dit_video.core.errors import UserError
from dit_video.diffusion.predictions import Estimator
from dit_video.diffusion.processes.process import Process, Values
from dit_video.diffusion.samplers.solvers import Solver, StepInterval


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
    """Number of steps that are done."""
    steps_left: Int[Array, ""]
    """Number of steps that remain."""
    order: Int[Array, ""]
    """Order of the last step."""


@dataclass(frozen=True, kw_only=True)
class UniPc(Solver):
    """UniPC with one evaluation per step; of accuracy `order` + 1 with the corrector.

    The first steps, which have no past yet, are of a lower order, and so is a step to time 0, where the log-SNR is
    infinite: there the data are the model's prediction.

    Raises:
      UserError: If the order is not 1, 2 or 3.
    """

    order: int = 2
    """Order of the predictor."""
    kind: Literal["bh1", "bh2"] = "bh2"
    """Form of $B(h)$ in the module docstring: `solver_type` of diffusers."""
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
        """Evaluate at `x`, correct `x` by it, and predict the sample at the next time."""
        advance = partial(_advance, process, self.kind)
        time, next_time = interval.time, interval.next_time
        prediction = estimate(state.x, time).data

        def make_corrector(order: int) -> Callable[[], Array]:
            indices = range(1, order)
            nodes = [time, *(state.times[k] for k in indices)]
            values = [prediction, *(state.predictions[k] for k in indices)]
            return lambda: advance(state.start_x, state.times[0], time, state.predictions[0], nodes, values)

        orders = range(1, self.order + 1)
        is_uncorrected = jnp.isin(state.steps_done - 1, jnp.asarray(self.uncorrected_steps, jnp.int32))
        x = jax.lax.switch(jnp.where(is_uncorrected, 0, state.order), [lambda: state.x, *map(make_corrector, orders)])

        predictions = jnp.concatenate([prediction[None], state.predictions[:-1]])
        times = jnp.concatenate([jnp.reshape(time, (1,)).astype(state.times.dtype), state.times[:-1]])

        def make_predictor(order: int) -> Callable[[], Array]:
            indices = range(1, order)
            nodes, values = [times[k] for k in indices], [predictions[k] for k in indices]
            return lambda: advance(x, time, next_time, prediction, nodes, values)

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


def _advance(
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
    """Return $w$ of the module docstring.

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
