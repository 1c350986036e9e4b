"""Jitted training step for any loss, with gradient accumulation and skipping of non-finite steps."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, PyTree

from dit_video.training.optim.ema import update_averages, update_ema
from dit_video.training.optim.optimizer import get_schedule_free_average
from dit_video.training.state import TrainState, replace_step


class Average(NamedTuple):
    """A metric stored as (total, number), so that averages over batches are exact even if a batch has no examples."""

    total: Float[Array, ""]
    number: Float[Array, ""]


Metrics = dict[str, Any]
"""Scalar arrays or `Average`s by name."""
Constants = tuple[PyTree, ...]
"""Arrays that a step passes to its loss as further arguments."""
Loss = Callable[..., tuple[Float[Array, ""], Metrics]]
"""Function `loss(params, batch, step, *constants) -> (mean loss, metrics)`."""


@runtime_checkable
class WeighedLoss(Protocol):
    """A loss that reports how many examples it averaged, so that microbatches can be combined exactly."""

    def weight(self, batch: PyTree) -> Float[Array, ""]:
        """Return the number of examples that the mean is over."""
        ...


@runtime_checkable
class StatefulLoss(Protocol):
    """A loss whose step also updates arrays without gradients: `TrainState.extra`, and parameters such as codebooks."""

    def start(self, params: dict[str, Any], *, fresh: bool = True) -> dict[str, Any]:
        """Return `extra` before the first step; `fresh` is False for parameters that were trained before."""
        ...

    def observed(
        self, params: PyTree, batch: PyTree, step: Array, *constants: PyTree
    ) -> tuple[Float[Array, ""], tuple[Metrics, Any]]:
        """Return the mean loss, its metrics, and the auxiliary output that is passed to `after`."""
        ...

    def after(self, state: TrainState, seen: Any) -> tuple[TrainState, Metrics]:
        """Return the state after the update without gradients, which follows the gradient update, and metrics."""
        ...


@runtime_checkable
class OwnStep(Protocol):
    """A loss with a step of its own, on a state that may hold more than a `TrainState` but has its `step` and `ema`."""

    def begin(self, state: TrainState, optimizer: optax.GradientTransformation) -> Any:
        """Return the state before the first step, from the plain `TrainState`. Traceable."""
        ...

    def make_step(self, optimizer: optax.GradientTransformation, *, ema_decay: float, constants: Constants) -> "StepFn":
        """Return the jitted `step(state, batch) -> (state, metrics)`; arguments are as for `step.make_step`."""
        ...


StepFn = Callable[[TrainState, PyTree], tuple[TrainState, Metrics]]
"""Jitted function `(state, batch) -> (state, metrics)`."""


def make_step(
    loss: Loss | StatefulLoss,
    optimizer: optax.GradientTransformation,
    *,
    ema_decay: float,
    constants: Constants = (),
    accumulation_steps: int = 1,
) -> StepFn:
    """Return the jitted `step(state, batch) -> (state, metrics)`, which donates the state.

    A step whose loss or gradient is not finite changes nothing but the step counter, bit for bit. The metric `skipped`
    is 1 for such a step, else 0.

    Args:
      loss: Loss to minimize.
      optimizer: Optimizer of the parameters.
      ema_decay: Decay of the parameters' moving average.
      constants: Arrays passed to the loss as further arguments, such as the weights of a perceptual network. (Arrays
        that the loss holds itself would be compiled into the program and make it large.)
      accumulation_steps: Number of microbatches that the batch's rows are divided into, whose gradients are computed
        sequentially and equal those of the batch up to rounding.

    Raises:
      TypeError: Gradient accumulation with a loss that is no `WeighedLoss`, or that is a `StatefulLoss`.
    """
    if accumulation_steps > 1 and not _can_accumulate(loss):
        raise TypeError(
            f"accumulation_steps={accumulation_steps} is invalid for {type(loss).__name__}, which does not report the "
            "weight of a microbatch. Use accumulation_steps=1."
        )

    def observed(params, batch, step, *constants):
        if isinstance(loss, StatefulLoss):
            return loss.observed(params, batch, step, *constants)
        value, metrics = loss(params, batch, step, *constants)
        return value, (metrics, None)

    def step(state, batch, *constants):
        args = (state.params, batch, state.step, *constants)
        if accumulation_steps == 1:
            (value, (metrics, seen)), gradients = jax.value_and_grad(observed, has_aux=True)(*args)
        else:
            value, metrics, gradients = accumulate_gradients(loss, accumulation_steps, *args)
            seen = None
        metrics = {"loss": value, "gradient_norm": optax.tree.norm(gradients), **metrics}
        next_state = apply_updates(state, gradients, optimizer, ema_decay=ema_decay)
        next_state, loss_metrics = update_loss_state(loss, next_state, seen)
        return skip_nonfinite(state, next_state, metrics | loss_metrics)

    return JittedStep(step, constants)


def _can_accumulate(loss: Any) -> bool:
    return isinstance(loss, WeighedLoss) and not isinstance(loss, StatefulLoss)


def accumulate_gradients(
    loss: Any, num_parts: int, params: PyTree, batch: PyTree, step: Array, *constants: PyTree
) -> tuple[Float[Array, ""], Metrics, PyTree]:
    """Return loss, metrics and gradients of a batch, accumulated in float32 over microbatches.

    Microbatch m has the rows m, m + num_parts, …, so that each device has equally many rows of every microbatch and no
    row moves to another device. Metrics other than `Average`s are means over the microbatches.

    Args:
      loss: A `WeighedLoss`, whose randomness depends on the example and not on its index in the batch.
      num_parts: Number of microbatches, a divisor of the number of rows.
      params: Parameters to differentiate with respect to.
      batch: Batch with rows as the first axis of each array.
      step: Training step.
      *constants: Further arguments of the loss.
    """
    microbatches = jax.tree.map(
        lambda leaf: jnp.moveaxis(leaf.reshape(leaf.shape[0] // num_parts, num_parts, *leaf.shape[1:]), 1, 0),
        jax.tree.map(jnp.asarray, batch),
    )
    total_weight = jnp.maximum(loss.weight(batch), 1)

    def add(total, microbatch):
        (value, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(params, microbatch, step, *constants)
        weight = loss.weight(microbatch) / total_weight
        total = jax.tree.map(lambda part, gradient: part + weight * gradient.astype(jnp.float32), total, gradients)
        return total, (weight * value, metrics)

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)
    gradients, (values, metrics) = jax.lax.scan(add, zeros, microbatches)
    return values.sum(), {name: _combine_metric(metric) for name, metric in metrics.items()}, gradients


def _combine_metric(metric: Any) -> Any:
    return Average(metric.total.sum(), metric.number.sum()) if isinstance(metric, Average) else metric.mean()


def skip_nonfinite(state: Any, next_state: Any, metrics: Metrics, *names: str) -> tuple[Any, Metrics]:
    """Return the next state, or the previous one if the step is not finite, and float32 metrics with `skipped`.

    A step is not finite if the loss, the gradient norm or one of the metrics `names` is NaN or infinite. The step
    counter increases in any case, so that the next step has another batch and other noise.
    """
    is_finite = jnp.all(jnp.stack([jnp.isfinite(metrics[name]) for name in ("loss", "gradient_norm", *names)]))
    selected_state = jax.tree.map(lambda new, old: jnp.where(is_finite, new, old), next_state, state)
    return replace_step(selected_state, next_state.step), cast_metrics(metrics | {"skipped": ~is_finite})


def apply_updates(
    state: TrainState, gradients: PyTree, optimizer: optax.GradientTransformation, *, ema_decay: float
) -> TrainState:
    """Return the state after one gradient update.

    If the optimizer averages the parameters itself, `ema` is that average, and further averages are computed from it.
    """
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    average = get_schedule_free_average(params, opt_state)
    return TrainState(
        step=state.step + 1,
        params=params,
        ema=update_ema(state.ema, params, state.step, decay=ema_decay) if average is None else average,
        opt_state=opt_state,
        extra=state.extra,
        averages=update_averages(state.averages, params if average is None else average, state.step),
    )


def update_loss_state(loss: Loss | StatefulLoss, state: TrainState, seen: Any) -> tuple[TrainState, Metrics]:
    """Return the state after the update of a `StatefulLoss` and its metrics; other losses do not change the state."""
    return loss.after(state, seen) if isinstance(loss, StatefulLoss) else (state, {})


def cast_metrics(metrics: Metrics) -> Metrics:
    """Cast metrics to float32 for logging."""
    return jax.tree.map(lambda metric: metric.astype(jnp.float32), metrics)


class JittedStep:
    """A jitted `step(state, batch, *constants)` that donates the state and returns it with unchanged shardings.

    Left to XLA, some arrays of the state would come back with another sharding, and the second step would be compiled
    again.
    """

    def __init__(self, step: Callable[..., Any], constants: Constants = ()) -> None:
        self._step, self._constants = step, constants
        self._programs: dict[Any, Any] = {}

    def __call__(self, state: Any, batch: PyTree) -> tuple[Any, Metrics]:
        return self._get_program(state)(state, batch, *self._constants)

    def lower(self, state: PyTree, batch: PyTree) -> jax.stages.Lowered:
        """Return the lowered step for a state and a batch, which may be shapes with shardings."""
        return self._get_program(state).lower(state, batch, *self._constants)

    def _get_program(self, state: PyTree) -> Any:
        leaves, structure = jax.tree.flatten(state)
        shardings = tuple(getattr(leaf, "sharding", None) for leaf in leaves if not isinstance(leaf, jax.core.Tracer))
        if (structure, shardings) not in self._programs:
            # On one device, and within another program, JAX chooses.
            fixed = len(shardings) == len(leaves) and all(isinstance(each, NamedSharding) for each in shardings)
            out_shardings = (jax.tree.unflatten(structure, shardings), None) if fixed else None
            self._programs[structure, shardings] = jax.jit(self._step, donate_argnums=0, out_shardings=out_shardings)
        return self._programs[structure, shardings]
