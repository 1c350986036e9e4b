"""Training steps: the step of any loss, with gradient accumulation, and what all steps have in common."""

import abc
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PyTree

from dit_video.core import trees
from dit_video.distributed import make_batch_shardings, make_shardings
from dit_video.distributed.mesh import AnyMesh
from dit_video.distributed.sharding import constrain_like_params
from dit_video.training.digests import compute_digest
from dit_video.training.optim.ema import EmaConfig, update_averages, update_ema
from dit_video.training.optim.optimizer import get_schedule_free_average
from dit_video.training.state import TrainState, attach_shardings, get_shapes_on_devices, init_state, replace_step


class Average(NamedTuple):
    """A metric stored as (total, number), so that averages over batches are exact even if a batch has no examples."""

    total: Float[Array, ""]
    number: Float[Array, ""]


Metrics = dict[str, Any]
"""Scalar arrays or `Average`s by name."""
Constants = tuple[PyTree, ...]
"""Arrays that a step passes to its loss as further arguments."""


class LossDetails(NamedTuple):
    """Results of a loss other than its value."""

    metrics: Metrics
    num_examples: Float[Array, ""] | None = None
    """Number of examples that the mean is over, by which microbatches are combined exactly. None for a loss that
    couples the examples of a batch, so that it is not the mean of its parts' losses."""
    auxiliary: Any = None
    """Values that the step uses after the update, such as the latents that a codebook learns from."""


class LossOutput(NamedTuple):
    """The result of a loss on a batch."""

    value: Float[Array, ""]
    """Mean loss."""
    details: LossDetails

    @classmethod
    def from_pair(cls, value: Float[Array, ""], details: LossDetails | Metrics) -> "LossOutput":
        """Return the result of any loss, which may be a pair of value and metrics."""
        return cls(value, details if isinstance(details, LossDetails) else LossDetails(details))


Loss = Callable[..., LossOutput | tuple[Float[Array, ""], Metrics]]
"""Function `loss(params, batch, step, *constants)` that returns a `LossOutput`, or the pair of value and metrics."""
BATCH_DIGESTS = "batch_digests"
"""Name of the metric with the digest of each array of the batch, by its path."""
StepFn = Callable[[Any, PyTree], tuple[Any, Metrics]]
"""Jitted function `(state, batch) -> (state, metrics)`."""
Observe = Callable[[jax.stages.Compiled], None]
"""Function that is called with a compiled step before its first call."""


def get_scalars(metrics: Metrics) -> Metrics:
    """Return the metrics of a step without the digests of its batch."""
    return {name: value for name, value in metrics.items() if name != BATCH_DIGESTS}


class TrainStep(abc.ABC):
    """A training step: it makes the first state from parameters, and updates it.

    A state may hold more than a `TrainState`, but has its `step` and `ema`.
    """

    @abc.abstractmethod
    def init(self, params: dict[str, Any], *, is_fresh: bool = True) -> Any:
        """Return the state before the first step; `is_fresh` is False for parameters that were trained before."""

    @abc.abstractmethod
    def update(self, state: Any, batch: PyTree, constants: Constants = ()) -> tuple[Any, Metrics]:
        """Return the state after one step, and metrics. Traceable."""

    def compile(self, constants: Constants = (), *, state: Any = None, observe: Observe | None = None) -> StepFn:
        """Return the jitted step, which donates the state.

        Args:
          constants: Arrays passed to the loss as further arguments, such as the weights of a perceptual network.
            (Arrays that the loss holds itself would be compiled into the program and make it large.)
          state: State whose shardings all states have; None to take them from the state of each call.
          observe: Function that is called with each program when it is compiled.
        """
        step = JittedStep(self.update, constants, observe)
        return step if state is None else step.specialize(state)


@dataclass(frozen=True, kw_only=True)
class ModelStep(TrainStep):
    """A step of a model with one optimizer and moving averages."""

    optimizer: optax.GradientTransformation
    ema_decay: float
    """Decay of the parameters' moving average."""
    averages: EmaConfig | None = None
    """Further averages of the parameters; None for none."""

    def init(self, params: dict[str, Any], *, is_fresh: bool = True) -> Any:
        return init_state(params, self.optimizer, averages=self.averages)


@dataclass(frozen=True, kw_only=True)
class GradientStep(ModelStep):
    """A step along the gradient of any loss.

    A step whose loss or gradient is not finite changes nothing but the step counter, bit for bit. The metric `skipped`
    is 1 for such a step, else 0.
    """

    loss: Loss
    """Loss to minimize."""
    accumulation_steps: int = 1
    """Number of microbatches that the batch's rows are divided into. Their gradients are computed one after the other,
    and their mean is the whole batch's gradient up to rounding. More than one need a loss that counts its examples."""
    mesh: AnyMesh | None = None
    """Mesh of the state, on which accumulated gradients are sharded like the parameters; None for a single device."""

    def update(self, state: TrainState, batch: PyTree, constants: Constants = ()) -> tuple[TrainState, Metrics]:
        args = (state.params, batch, state.step, *constants)
        if self.accumulation_steps == 1:
            (value, details), gradients = compute_gradients(self.loss, *args)
        else:
            (value, details), gradients = accumulate_gradients(
                self.loss, self.accumulation_steps, *args, mesh=self.mesh
            )
        metrics = {"loss": value, "gradient_norm": optax.tree.norm(gradients), **details.metrics}
        next_state = apply_updates(state, gradients, self.optimizer, ema_decay=self.ema_decay)
        next_state, own_metrics = self.update_extra(next_state, details.auxiliary)
        return finish_step(state, next_state, batch, metrics | own_metrics)

    def update_extra(self, state: TrainState, auxiliary: Any) -> tuple[TrainState, Metrics]:
        """Update what is learned without gradients, after the gradient update; return the state and further metrics."""
        return state, {}


def compute_gradients(loss: Loss, params: PyTree, *args: Any) -> tuple[LossOutput, PyTree]:
    """Return a loss and its gradients with respect to the parameters."""
    pair, gradients = jax.value_and_grad(loss, has_aux=True)(params, *args)
    return LossOutput.from_pair(*pair), gradients


def accumulate_gradients(
    loss: Loss,
    num_parts: int,
    params: PyTree,
    batch: PyTree,
    step: Array,
    *constants: PyTree,
    mesh: AnyMesh | None = None,
) -> tuple[LossOutput, PyTree]:
    """Return loss and gradients of a batch, accumulated in float32 over microbatches.

    Microbatch m has the rows m, m + num_parts, …, so that each device has equally many rows of every microbatch and no
    row moves to another device. Metrics other than `Average`s are means over the microbatches.

    Args:
      loss: Loss whose randomness depends on the example and not on its index in the batch.
      num_parts: Number of microbatches, a divisor of the number of rows.
      params: Parameters to differentiate with respect to.
      batch: Batch with rows as the first axis of each array.
      step: Training step.
      *constants: Further arguments of the loss.
      mesh: Mesh on which the sums are sharded like the parameters; None for a single device.

    Raises:
      TypeError: If the loss does not count its examples.
    """
    microbatches = jax.tree.map(
        lambda leaf: jnp.moveaxis(leaf.reshape(leaf.shape[0] // num_parts, num_parts, *leaf.shape[1:]), 1, 0),
        jax.tree.map(jnp.asarray, batch),
    )

    def add(total, microbatch):
        (value, details), gradients = compute_gradients(loss, params, microbatch, step, *constants)
        if (weight := details.num_examples) is None:
            name = getattr(loss, "__name__", type(loss).__name__)
            rule = f"is invalid for {name}, which does not count its examples. Use accumulation_steps=1."
            raise TypeError(f"accumulation_steps={num_parts} {rule}")
        total = jax.tree.map(lambda part, gradient: part + weight * gradient.astype(jnp.float32), total, gradients)
        return constrain_like_params(total, mesh), (weight, weight * value, details.metrics)

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)
    zeros = constrain_like_params(zeros, mesh)
    gradients, (counts, values, metrics) = jax.lax.scan(add, zeros, microbatches)
    count = jnp.maximum(counts.sum(), 1)
    metrics = {
        name: Average(metric.total.sum(), metric.number.sum()) if isinstance(metric, Average) else metric.mean()
        for name, metric in metrics.items()
    }
    output = LossOutput(values.sum() / count, LossDetails(metrics, count))
    return output, jax.tree.map(lambda leaf: leaf / count, gradients)


def finish_step(state: Any, next_state: Any, batch: PyTree, metrics: Metrics, *names: str) -> tuple[Any, Metrics]:
    """Return the next state, or the previous one if the step is not finite, and its metrics.

    A step is not finite if the loss, the gradient norm or one of the metrics `names` is NaN or infinite. The step
    counter increases in any case, so that the next step has another batch and other noise.

    All metrics are cast to float32. `skipped` is added, and `BATCH_DIGESTS`, from which a hash chain records the batch.
    (Digests in a program of their own would run beside the step, and two programs on several CPU devices may deadlock.)
    """
    is_finite = jnp.all(jnp.stack([jnp.isfinite(metrics[name]) for name in ("loss", "gradient_norm", *names)]))
    selected_state = jax.tree.map(lambda new, old: jnp.where(is_finite, new, old), next_state, state)
    digests = {path: compute_digest(leaf) for path, leaf in trees.flatten(batch).items()}
    metrics = jax.tree.map(lambda metric: metric.astype(jnp.float32), {**metrics, "skipped": ~is_finite})
    return replace_step(selected_state, next_state.step), {**metrics, BATCH_DIGESTS: digests}


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


class JittedStep:
    """A jitted `step(state, batch, constants)` that donates the state and returns it with unchanged shardings.

    Left to XLA, some arrays of the state would come back with another sharding, and the second step would be compiled
    again.
    """

    def __init__(self, step: Callable[..., Any], constants: Constants = (), observe: Observe | None = None) -> None:
        self._step, self._constants, self._observe = step, constants, observe
        self._programs: dict[Any, Any] = {}
        self._observed: set[Any] = set()

    def __call__(self, state: Any, batch: PyTree) -> tuple[Any, Metrics]:
        return self._run(self.get_program(state), state, batch)

    def specialize(self, state: Any) -> StepFn:
        """Return the step for states with the shardings of this one."""
        return functools.partial(self._run, self.get_program(state))

    def _run(self, program: Any, state: Any, batch: PyTree) -> tuple[Any, Metrics]:
        if self._observe is not None:
            key = (program, *(getattr(leaf, "shape", None) for leaf in jax.tree.leaves(batch)))
            if key not in self._observed:
                self._observed.add(key)
                # The call below takes the program that is compiled here.
                self._observe(program.lower(state, batch, self._constants).compile())
        return program(state, batch, self._constants)

    def get_program(self, state: PyTree) -> Any:
        """Return the jitted function `(state, batch, constants)` for a state, which may be shapes with shardings."""
        leaves, structure = jax.tree.flatten(state)
        shardings = tuple(getattr(leaf, "sharding", None) for leaf in leaves if not isinstance(leaf, jax.core.Tracer))
        if (structure, shardings) not in self._programs:
            # On one device, and within another program, JAX chooses.
            fixed = len(shardings) == len(leaves) and all(isinstance(each, NamedSharding) for each in shardings)
            out_shardings = (jax.tree.unflatten(structure, shardings), None) if fixed else None
            self._programs[structure, shardings] = jax.jit(self._step, donate_argnums=0, out_shardings=out_shardings)
        return self._programs[structure, shardings]


def make_step_program(
    train_step: TrainStep,
    init: Callable[[Array], dict[str, Any]],
    batch: PyTree,
    mesh: AnyMesh,
    *,
    constants: tuple[PyTree, ...] = (),
    frozen_params: tuple[PyTree, ...] = (),
) -> tuple[Any, tuple[PyTree, ...]]:
    """Return the jitted step of a training on a mesh, and the shapes of its arguments; nothing is computed.

    Args:
      train_step: Step of the training.
      init: Traceable function from a random key to parameters.
      batch: Global batch, or its shapes.
      mesh: Devices, which need not be present.
      constants: Constants of the step, which are replicated, or their shapes.
      frozen_params: Further constants, which are sharded like parameters.
    """
    layout = functools.partial(make_shardings, mesh=mesh)
    state = get_shapes_on_devices(lambda key: train_step.init(init(key)), shardings=layout)
    arguments = (
        state,
        attach_shardings(batch, make_batch_shardings(batch, mesh)),
        attach_shardings((*constants, *frozen_params), make_constant_shardings(constants, frozen_params, mesh)),
    )
    return JittedStep(train_step.update).get_program(state), arguments


def make_constant_shardings(
    constants: tuple[PyTree, ...], frozen_params: tuple[PyTree, ...], mesh: AnyMesh
) -> tuple[PyTree, ...]:
    """Return the shardings of `(*constants, *frozen_params)`, the last arguments of a step."""
    replicated = NamedSharding(mesh, PartitionSpec())
    return (*jax.tree.map(lambda _: replicated, constants), *make_shardings(frozen_params, mesh))
