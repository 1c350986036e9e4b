"""One training step, for any loss."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from dit_video.training.ema import update_ema
from dit_video.training.state import TrainState

Loss = Callable[..., tuple[Float[Array, ""], dict[str, Float[Array, ""]]]]
"""`loss(params, batch, step) -> (mean loss, figures to log)`; the constants of a step are further arguments"""


@runtime_checkable
class StatefulLoss(Protocol):
    """A loss beside which a step updates what no gradient reaches: `TrainState.extra`, and parameters with it."""

    def start(self, params: dict[str, Any], *, fresh: bool = True) -> dict[str, Any]:
        """What `extra` is before the first step; `fresh` parameters are of no training before."""
        ...

    def observed(
        self, params: PyTree, batch: PyTree, step: Array, *constants: PyTree
    ) -> tuple[Float[Array, ""], tuple[dict[str, Float[Array, ""]], Any]]:
        """The mean loss, the figures to log, and what `after` is to see of the batch."""
        ...

    def after(self, state: TrainState, seen: Any) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
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


Step = Callable[[TrainState, PyTree], tuple[TrainState, dict[str, Float[Array, ""]]]]


def make_step(
    loss: Loss | StatefulLoss,
    optimizer: optax.GradientTransformation,
    *,
    ema_decay: float,
    constants: tuple[PyTree, ...] = (),
) -> Step:
    """`step(state, batch) -> (state, figures)`, jitted; the state is donated.

    Args:
      loss: what is minimised.
      optimizer: of the parameters.
      ema_decay: of their moving average.
      constants: arrays that the loss is given too, such as the weights of a network that judges. (What a loss holds
        itself becomes a part of the program, which weights would make large.)
    """

    def observed(params, batch, step, *constants):
        if isinstance(loss, StatefulLoss):
            return loss.observed(params, batch, step, *constants)
        value, figures = loss(params, batch, step, *constants)
        return value, (figures, None)

    def step(state, batch, *constants):
        (value, (figures, seen)), gradients = jax.value_and_grad(observed, has_aux=True)(
            state.params, batch, state.step, *constants
        )
        figures = {"loss": value, "gradient_norm": optax.tree.norm(gradients), **figures}
        state = following(state, gradients, optimizer, ema_decay=ema_decay)
        state, learned = noted(loss, state, seen)
        return state, float_figures(figures | learned)

    return with_constants(jax.jit(step, donate_argnums=0), constants)


def following(
    state: TrainState, gradients: PyTree, optimizer: optax.GradientTransformation, *, ema_decay: float
) -> TrainState:
    """The state after one update by these gradients."""
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return TrainState(
        step=state.step + 1,
        params=params,
        ema=update_ema(state.ema, params, state.step, decay=ema_decay),
        opt_state=opt_state,
        extra=state.extra,
    )


def noted(loss: Loss | StatefulLoss, state: TrainState, seen: Any) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """The state after what the loss does beside the gradients, and its figures; most losses do nothing."""
    return loss.after(state, seen) if isinstance(loss, StatefulLoss) else (state, {})


def float_figures(figures: dict[str, Array]) -> dict[str, Float[Array, ""]]:
    """As they are logged."""
    return {name: figure.astype(jnp.float32) for name, figure in figures.items()}


def with_constants(step: Callable[..., Any], constants: tuple[PyTree, ...]) -> Step:
    """A jitted step whose last arguments are these."""
    return (lambda state, batch: step(state, batch, *constants)) if constants else step
