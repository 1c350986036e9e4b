"""States and steps of a plain training of one loss."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from dit_video.training.state import TrainState, get_shapes_on_devices, init_state, make_on_devices
from dit_video.training.step import Constants, GradientStep, Loss, StepFn


def create_state(
    init: Callable, optimizer: optax.GradientTransformation, random_key: jax.Array, *, shardings: Callable | None = None
) -> TrainState:
    """Create the state of a training at its first step."""
    return make_on_devices(lambda key: init_state(init(key), optimizer), random_key, shardings=shardings)


def get_state_shapes(
    init: Callable, optimizer: optax.GradientTransformation, *, shardings: Callable | None = None
) -> Any:
    """Return the shapes of the state of `create_state`."""
    return get_shapes_on_devices(lambda key: init_state(init(key), optimizer), shardings=shardings)


def make_step(
    loss: Loss, optimizer: optax.GradientTransformation, *, ema_decay: float, constants: Constants = (), **options: Any
) -> StepFn:
    """Return the compiled step of a loss."""
    return GradientStep(loss=loss, optimizer=optimizer, ema_decay=ema_decay, **options).compile(constants)
