"""A training step of nothing but forward, backward and AdamW."""

from collections.abc import Callable
from typing import Any

import jax
import optax

RATE, DECAY = 1e-4, 0.01
_OPTIMIZER = optax.adamw(RATE, weight_decay=DECAY)


def start(params: Any) -> tuple[Any, Any]:
    """What `step_of` takes first: parameters of its own, and the optimizer's state."""
    return jax.jit(lambda params: (jax.tree.map(jax.numpy.copy, params), _OPTIMIZER.init(params)))(params)


def step_of(error: Callable[..., jax.Array]) -> Callable[..., tuple[Any, Any, jax.Array]]:
    """`params, state, error = step(params, state, *given)`, jitted; parameters and state are donated."""

    def step(params: Any, state: Any, *given: Any) -> tuple[Any, Any, jax.Array]:
        loss, gradients = jax.value_and_grad(error)(params, *given)
        updates, state = _OPTIMIZER.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    return jax.jit(step, donate_argnums=(0, 1))
