"""What a training run carries from step to step."""

from collections.abc import Callable
from dataclasses import field, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.struct import dataclass
from jax.experimental import multihost_utils
from jaxtyping import Array, PyTree

from dit_video.training.optim.ema import Averages, copied


@dataclass
class TrainState:
    """A tree of arrays: what a checkpoint holds. Parameters are plain nested dictionaries, without Flax types."""

    step: Any
    """steps done, an int32 scalar; `Any`, for trees of shapes and of layouts have this structure too"""
    params: dict[str, Any]
    ema: dict[str, Any]
    """the moving average of `params`, in float32"""
    opt_state: PyTree
    extra: dict[str, Any]
    """what else a step updates (codebooks, running moments)"""
    averages: dict[str, Any] = field(default_factory=dict)
    """further averages of `params`, by kind and value; see `Averages`"""


class WithModel:
    """A state that holds the model's beside another player's: its step and averages are the model's."""

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
    def averages(self) -> dict[str, Any]:
        return self.model.averages


def with_step(state: Any, step: Array) -> Any:
    """The same state after so many steps."""
    if isinstance(state, WithModel):
        return replace(state, model=replace(state.model, step=step))  # type: ignore[type-var]  # of flax.struct
    return replace(state, step=step)


Start = Callable[[dict[str, Any]], dict[str, Any]]
"""What `extra` of a new state is, from its parameters."""


def init_state(
    params: dict[str, Any],
    optimizer: optax.GradientTransformation,
    extra: dict[str, Any] | None = None,
    averages: Averages | None = None,
) -> TrainState:
    """The state before the first step; averages start at the parameters. Traceable."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=copied(params),
        opt_state=optimizer.init(params),
        extra=extra or {},
        averages={} if averages is None else averages.start(params),
    )


def new_state(
    init: Callable[[Array], dict[str, Any]],
    optimizer: optax.GradientTransformation,
    random_key: Array,
    *,
    start: Start | None = None,
    shardings: Callable[[PyTree], PyTree] | None = None,
) -> TrainState:
    """The state of a new run, made on the devices themselves: each computes its own shard.

    Args:
      init: parameters from a random key.
      optimizer: whose state is made beside them.
      random_key: for `init`.
      start: of what the step updates beside the parameters (`StatefulLoss.start`); None for nothing.
      shardings: from the state's shapes to its layout; None leaves it to JAX.
    """

    return make_on_devices(_make(init, optimizer, start), random_key, shardings=shardings)


def state_shapes(
    init: Callable[[Array], dict[str, Any]],
    optimizer: optax.GradientTransformation,
    *,
    start: Start | None = None,
    averages: Averages | None = None,
    shardings: Callable[[PyTree], PyTree] | None = None,
) -> PyTree:
    """Shapes, dtypes and layout of the state: what a checkpoint is restored into."""
    return shapes_on_devices(_make(init, optimizer, start, averages), shardings=shardings)


def _make(
    init: Callable[[Array], dict[str, Any]],
    optimizer: optax.GradientTransformation,
    start: Start | None,
    averages: Averages | None = None,
) -> Callable[[Array], TrainState]:
    def make(key: Array) -> TrainState:
        params = init(key)
        return init_state(params, optimizer, None if start is None else start(params), averages)

    return make


def make_on_devices(
    make: Callable[..., PyTree],
    random_key: Array,
    *given: PyTree,
    shardings: Callable[[PyTree], PyTree] | None = None,
) -> Any:
    """`make(random_key, *given)`, any state, where each device computes its own shard; `given` is used up."""
    layout = None if shardings is None else shardings(jax.eval_shape(make, random_key, *given))
    taken = tuple(range(1, 1 + len(given)))
    return jax.jit(make, out_shardings=layout, donate_argnums=taken)(random_key, *given)


def shapes_on_devices(
    make: Callable[[Array], PyTree], *, shardings: Callable[[PyTree], PyTree] | None = None
) -> PyTree:
    """Shapes, dtypes and layout of any state that `make` makes of a key."""
    shapes = jax.eval_shape(make, jax.random.key(0))
    if shardings is None:
        return shapes
    return jax.tree.map(
        lambda leaf, layout: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout), shapes, shardings(shapes)
    )


def on_host(tree: PyTree) -> PyTree:
    """Arrays of NumPy, whole in every process; with several, all call this."""
    if all(leaf.is_fully_addressable for leaf in jax.tree.leaves(tree)):
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)
