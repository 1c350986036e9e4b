"""A training of a linear layer that goes through `training.loop.run`."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dit_video.training.checkpoint import Checkpoints
from dit_video.training.hooks.hook import Hook, StepCall
from dit_video.training.hooks.logging import MetricsLog
from dit_video.training.loop import LoopConfig, run


@jax.tree_util.register_dataclass
@dataclass
class State:
    """State of the training."""

    step: Any
    params: Any
    opt_state: Any


OPTIMIZER = optax.adam(1e-2)


def init_state() -> State:
    """Return the state before the first step."""
    params = {"w": jax.random.normal(jax.random.key(0), (8, 4)), "b": jnp.zeros(4)}
    return State(jnp.zeros((), jnp.int32), params, OPTIMIZER.init(params))


def get_state_shapes() -> State:
    """Return the shapes of the state, into which a checkpoint is restored."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), init_state())


def compute_loss(params: Any, batch: Any) -> Any:
    """Compute the mean squared error of a batch."""
    return jnp.mean((jnp.tanh(batch["x"] @ params["w"] + params["b"]) - batch["y"]) ** 2)


@jax.jit
def plain_step(state: State, batch: Any) -> tuple[State, dict[str, Any]]:
    """Take a step that leaves the memory of the old state alone."""
    loss, gradients = jax.value_and_grad(compute_loss)(state.params, batch)
    updates, opt_state = OPTIMIZER.update(gradients, state.opt_state)
    state = State(state.step + 1, optax.apply_updates(state.params, updates), opt_state)
    return state, {"loss": loss, "norm": jnp.linalg.norm(gradients["w"])}


step = jax.jit(plain_step, donate_argnums=0)


def make_batches(done: int, *, bad: int = -1) -> Iterator[Any]:
    """Yield batches that depend on the step; the batch of step `bad`, counted from 1, is not a number."""
    while True:
        numbers = np.random.default_rng(done)
        x, y = numbers.normal(size=(16, 8)).astype(np.float32), numbers.normal(size=(16, 4)).astype(np.float32)
        done += 1
        yield {"x": x * (math.nan if done == bad else 1), "y": y}


def train(folder: Path, config: LoopConfig, **options: Any) -> State:
    """Start or continue a run in a folder; `options` are those of `run`, `data`, and `on_step`, called after steps."""
    checkpoints = Checkpoints(folder / "checkpoints")
    state = init_state() if checkpoints.latest() is None else checkpoints.restore(get_state_shapes())[0]
    hooks: list[Hook] = [MetricsLog(folder / "metrics.jsonl")]
    if "on_step" in options:
        hooks.append(StepCall(options.pop("on_step")))
    data = options.pop("data", make_batches)
    return run(step, state, data, config=config, checkpoints=checkpoints, hooks=hooks, **options)
