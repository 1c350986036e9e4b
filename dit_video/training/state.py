"""What a training run carries from step to step."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.struct import dataclass
from jaxtyping import Array, Int32, PyTree

from dit_video.rng import key


@dataclass
class TrainState:
    """A tree of arrays: what a checkpoint holds. Parameters are plain nested dictionaries, without Flax types."""

    step: Int32[Array, ""]
    """steps done"""
    params: dict[str, Any]
    ema: dict[str, Any]
    """the moving average of `params`, in float32"""
    opt_state: PyTree
    extra: dict[str, Any]
    """what else a step updates (codebooks, running moments)"""


def graph_of(make) -> nnx.GraphDef:
    """The structure of the module that `make(rngs)` builds, without computing a parameter."""
    return nnx.graphdef(nnx.eval_shape(lambda: make(nnx.Rngs(jax.random.key(0)))))


def init_params(make, random_key: Array) -> dict[str, Any]:
    """Parameters of the module that `make(rngs)` builds, as a nested dictionary. Traceable."""
    return nnx.to_pure_dict(nnx.state(make(nnx.Rngs(random_key)), nnx.Param))


def init_state(params: dict[str, Any], optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step; the average starts at the parameters. Traceable."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=jax.tree.map(jnp.copy, params),
        opt_state=optimizer.init(params),
        extra={},
    )


def new_state(
    make, optimizer: optax.GradientTransformation, *, seed: int, purpose: str, shardings: PyTree | None = None
) -> TrainState:
    """Initialise on the devices themselves: each computes its own shard."""

    def init(random_key):
        return init_state(init_params(make, random_key), optimizer)

    return jax.jit(init, out_shardings=shardings)(key(seed, purpose))
