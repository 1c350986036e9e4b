"""Training state, and its creation on the devices of a mesh."""

from collections.abc import Callable
from dataclasses import field, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.struct import dataclass
from jaxtyping import Array, PyTree

from dit_video.training.optim.ema import EmaConfig, copy_float32


@dataclass
class TrainState:
    """Training state as a tree of arrays, which a checkpoint holds. Parameters are plain nested dictionaries."""

    step: Any
    """Number of steps done, an int32 scalar; typed `Any` because trees of shapes and shardings share this structure."""
    params: dict[str, Any]
    ema: dict[str, Any]
    """Moving average of `params`, in float32."""
    opt_state: PyTree
    extra: dict[str, Any]
    """Further arrays that a step updates, such as codebook counts and running moments."""
    averages: dict[str, Any] = field(default_factory=dict)
    """Further averages of `params`, by kind and value; see `EmaConfig`."""


class CompositeState:
    """A state of the model and of a second network; its step, averages and moments are the model's."""

    model: TrainState

    @property
    def step(self) -> Any:
        return self.model.step

    @property
    def ema(self) -> dict[str, Any]:
        return self.model.ema

    @property
    def params(self) -> dict[str, Any]:
        return self.model.params

    @property
    def opt_state(self) -> PyTree:
        return self.model.opt_state

    @property
    def averages(self) -> dict[str, Any]:
        return self.model.averages


def replace_step(state: Any, step: Array) -> Any:
    """Return the state with another step counter."""
    if isinstance(state, CompositeState):
        return replace(state, model=replace(state.model, step=step))  # type: ignore[type-var]  # of flax.struct
    return replace(state, step=step)


Layout = Callable[[PyTree], PyTree]
"""Function from a tree of shapes to the sharding of each."""


def init_state(
    params: dict[str, Any],
    optimizer: optax.GradientTransformation,
    averages: EmaConfig | None = None,
) -> TrainState:
    """Return the state before the first step, whose averages are the parameters. Traceable."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=copy_float32(params),
        opt_state=optimizer.init(params),
        extra={},
        averages={} if averages is None else averages.init_averages(params),
    )


def make_on_devices(
    make: Callable[..., PyTree], random_key: Array, *args: PyTree, shardings: Layout | None = None
) -> Any:
    """Return the state `make(random_key, *args)`; each device computes its own shard, and `args` are donated."""
    layout = None if shardings is None else shardings(jax.eval_shape(make, random_key, *args))
    donated = tuple(range(1, 1 + len(args)))
    return jax.jit(make, out_shardings=layout, donate_argnums=donated)(random_key, *args)


def attach_shardings(shapes: PyTree, shardings: PyTree) -> PyTree:
    """Return shapes (of arrays, too) with their layout on the devices."""

    def attach(leaf: Any, layout: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout)

    return jax.tree.map(attach, shapes, shardings)


def get_shapes_on_devices(make: Callable[[Array], PyTree], *, shardings: Layout | None = None) -> PyTree:
    """Return the shapes, dtypes and shardings of the state that `make` returns for a random key."""
    shapes = jax.eval_shape(make, jax.random.key(0))
    return shapes if shardings is None else attach_shardings(shapes, shardings(shapes))
