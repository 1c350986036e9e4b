"""One training step, for any loss."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from dit_video.training.optim.ema import update_averages, update_ema
from dit_video.training.optim.optimizer import own_average
from dit_video.training.state import TrainState, with_step


class Ratio(NamedTuple):
    """A figure that is a mean over something of which a batch may have none: means of it are of totals and numbers."""

    total: Float[Array, ""]
    number: Float[Array, ""]


Figures = dict[str, Any]
"""scalar arrays, or ratios, by name"""
Loss = Callable[..., tuple[Float[Array, ""], Figures]]
"""`loss(params, batch, step) -> (mean loss, figures to log)`; the constants of a step are further arguments"""


@runtime_checkable
class WeighedLoss(Protocol):
    """A loss that is a mean over what a batch has a number of, so that parts of a batch can be put together."""

    def weight(self, batch: PyTree) -> Float[Array, ""]:
        """How many the mean is over."""
        ...


@runtime_checkable
class StatefulLoss(Protocol):
    """A loss beside which a step updates what no gradient reaches: `TrainState.extra`, and parameters with it."""

    def start(self, params: dict[str, Any], *, fresh: bool = True) -> dict[str, Any]:
        """What `extra` is before the first step; `fresh` parameters are of no training before."""
        ...

    def observed(
        self, params: PyTree, batch: PyTree, step: Array, *constants: PyTree
    ) -> tuple[Float[Array, ""], tuple[Figures, Any]]:
        """The mean loss, the figures to log, and what `after` is to see of the batch."""
        ...

    def after(self, state: TrainState, seen: Any) -> tuple[TrainState, Figures]:
        """The state that follows a step, whose gradients are applied already, and figures to log."""
        ...


@runtime_checkable
class OwnStep(Protocol):
    """A loss that makes the step itself, of a state that may hold more than a `TrainState`; it has `step` and `ema`."""

    def begin(self, state: TrainState, optimizer: optax.GradientTransformation) -> Any:
        """The state before the first step, from what it is of any other loss. Traceable."""
        ...

    def make_step(
        self, optimizer: optax.GradientTransformation, *, ema_decay: float, constants: tuple[PyTree, ...]
    ) -> "Step":
        """`step(state, batch) -> (state, figures)`, jitted; arguments are as for the function of this name."""
        ...


Step = Callable[[TrainState, PyTree], tuple[TrainState, Figures]]


def make_step(
    loss: Loss | StatefulLoss,
    optimizer: optax.GradientTransformation,
    *,
    ema_decay: float,
    constants: tuple[PyTree, ...] = (),
    accumulate: int = 1,
) -> Step:
    """`step(state, batch) -> (state, figures)`, jitted; the state is donated.

    A step whose loss or gradient is not finite leaves all but the count of steps as it was, bit for bit; the figure
    `skipped` is 1 then, else 0.

    Args:
      loss: what is minimised.
      optimizer: of the parameters.
      ema_decay: of their moving average.
      constants: arrays that the loss is given too, such as the weights of a network that judges. (What a loss holds
        itself becomes a part of the program, which weights would make large.)
      accumulate: into how many parts the batch's rows are divided, whose gradients are computed one after the other:
        but for rounding those of the whole. The loss says what the parts weigh.

    Raises:
      TypeError: a loss that does not say it.
    """
    if accumulate > 1 and not _comes_in_parts(loss):
        raise TypeError(f"{type(loss).__name__} doesn't say what the parts of a batch weigh; accumulate=1 alone fits")

    def observed(params, batch, step, *constants):
        if isinstance(loss, StatefulLoss):
            return loss.observed(params, batch, step, *constants)
        value, figures = loss(params, batch, step, *constants)
        return value, (figures, None)

    def step(state, batch, *constants):
        given = (state.params, batch, state.step, *constants)
        if accumulate == 1:
            (value, (figures, seen)), gradients = jax.value_and_grad(observed, has_aux=True)(*given)
        else:
            value, figures, gradients = accumulated(loss, accumulate, *given)
            seen = None
        figures = {"loss": value, "gradient_norm": optax.tree.norm(gradients), **figures}
        after = following(state, gradients, optimizer, ema_decay=ema_decay)
        after, learned = noted(loss, after, seen)
        return unless_broken(state, after, figures | learned)

    return with_constants(jax.jit(step, donate_argnums=0), constants)


def _comes_in_parts(loss: Any) -> bool:
    return isinstance(loss, WeighedLoss) and not isinstance(loss, StatefulLoss)


def accumulated(
    loss: Any, number: int, params: PyTree, batch: PyTree, step: Array, *constants: PyTree
) -> tuple[Float[Array, ""], Figures, PyTree]:
    """Loss, figures and gradients of a batch, part by part, summed in float32.

    Part m has the rows m, m + number, …: so each device has as many rows of every part, and none goes elsewhere.
    Figures that are no ratios are means over the parts.

    Args:
      loss: a `WeighedLoss`; its randomness is a function of the example, not of the place in the batch.
      number: of parts, which divides the rows.
    """
    parts = jax.tree.map(
        lambda leaf: jnp.moveaxis(leaf.reshape(leaf.shape[0] // number, number, *leaf.shape[1:]), 1, 0),
        jax.tree.map(jnp.asarray, batch),
    )
    whole = jnp.maximum(loss.weight(batch), 1)

    def add(total, part):
        (value, figures), gradients = jax.value_and_grad(loss, has_aux=True)(params, part, step, *constants)
        share = loss.weight(part) / whole
        total = jax.tree.map(lambda sum, gradient: sum + share * gradient.astype(jnp.float32), total, gradients)
        return total, (share * value, figures)

    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)
    gradients, (values, figures) = jax.lax.scan(add, nothing, parts)
    return values.sum(), {name: _put_together(figure) for name, figure in figures.items()}, gradients


def _put_together(figure: Any) -> Any:
    """A figure of a batch, from those of its parts."""
    return Ratio(figure.total.sum(), figure.number.sum()) if isinstance(figure, Ratio) else figure.mean()


def unless_broken(before: Any, after: Any, figures: Figures, *watched: str) -> tuple[Any, Figures]:
    """The state after a step and its figures as they are logged; with `skipped`, the state before it if it is broken.

    It is where the loss, the gradient's norm or another `watched` figure is NaN or infinite. The steps are counted on,
    for the next one is to have another batch, and other noise.
    """
    fine = jnp.all(jnp.stack([jnp.isfinite(figures[name]) for name in ("loss", "gradient_norm", *watched)]))
    kept = jax.tree.map(lambda new, old: jnp.where(fine, new, old), after, before)
    return with_step(kept, after.step), float_figures(figures | {"skipped": ~fine})


def following(
    state: TrainState, gradients: PyTree, optimizer: optax.GradientTransformation, *, ema_decay: float
) -> TrainState:
    """The state after one update by these gradients.

    Where the optimizer averages the parameters itself, `ema` is that average, and further averages are of it.
    """
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    own = own_average(params, opt_state)
    return TrainState(
        step=state.step + 1,
        params=params,
        ema=update_ema(state.ema, params, state.step, decay=ema_decay) if own is None else own,
        opt_state=opt_state,
        extra=state.extra,
        averages=update_averages(state.averages, params if own is None else own, state.step),
    )


def noted(loss: Loss | StatefulLoss, state: TrainState, seen: Any) -> tuple[TrainState, Figures]:
    """The state after what the loss does beside the gradients, and its figures; most losses do nothing."""
    return loss.after(state, seen) if isinstance(loss, StatefulLoss) else (state, {})


def float_figures(figures: Figures) -> Figures:
    """As they are logged."""
    return jax.tree.map(lambda figure: figure.astype(jnp.float32), figures)


def with_constants(step: Callable[..., Any], constants: tuple[PyTree, ...]) -> Step:
    """A jitted step whose last arguments are these."""
    return (lambda state, batch: step(state, batch, *constants)) if constants else step
