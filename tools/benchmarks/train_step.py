"""A minimal training step: forward, backward and AdamW."""

from collections.abc import Callable
from typing import Any

import jax
import optax

LEARNING_RATE, WEIGHT_DECAY = 1e-4, 0.01
_OPTIMIZER = optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)


def init_train_state(params: Any) -> tuple[Any, Any]:
    """Return a copy of the parameters and the optimizer's state, the first arguments of a training step."""
    return jax.jit(lambda params: (jax.tree.map(jax.numpy.copy, params), _OPTIMIZER.init(params)))(params)


def make_train_step(loss_fn: Callable[..., jax.Array]) -> Callable[..., tuple[Any, Any, jax.Array]]:
    """Make a jitted `params, state, loss = step(params, state, *inputs)`; parameters and state are donated."""

    def step(params: Any, state: Any, *inputs: Any) -> tuple[Any, Any, jax.Array]:
        loss, gradients = jax.value_and_grad(loss_fn)(params, *inputs)
        updates, state = _OPTIMIZER.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    return jax.jit(step, donate_argnums=(0, 1))
