"""One training step, for any loss."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from dit_video.training.ema import update_ema
from dit_video.training.state import TrainState

Loss = Callable[[PyTree, PyTree, Array], tuple[Float[Array, ""], dict[str, Float[Array, ""]]]]
"""`loss(params, batch, step) -> (mean loss, figures to log)`"""
Step = Callable[[TrainState, PyTree], tuple[TrainState, dict[str, Float[Array, ""]]]]


def make_step(loss: Loss, optimizer: optax.GradientTransformation, *, ema_decay: float) -> Step:
    """`step(state, batch) -> (state, figures)`, jitted; the state is donated."""

    def step(state, batch):
        (value, figures), gradients = jax.value_and_grad(loss, has_aux=True)(state.params, batch, state.step)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        figures = {"loss": value, "gradient_norm": optax.tree.norm(gradients), **figures}
        following = TrainState(
            step=state.step + 1,
            params=params,
            ema=update_ema(state.ema, params, state.step, decay=ema_decay),
            opt_state=opt_state,
            extra=state.extra,
        )
        return following, jax.tree.map(lambda figure: figure.astype(jnp.float32), figures)

    return jax.jit(step, donate_argnums=0)
