"""Modules as containers: a structure, and parameters as a plain nested dictionary."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array

Make = Callable[[nnx.Rngs], nnx.Module]


def graph_of(make: Make) -> nnx.GraphDef:
    """The structure of the module that `make` builds, without computing a parameter.

    `nnx.merge(graph, params)` gives the module back, inside or outside of `jax.jit`.
    """
    return nnx.graphdef(nnx.eval_shape(lambda: make(nnx.Rngs(jax.random.key(0)))))


def init_params(make: Make, key: Array) -> dict[str, Any]:
    """Fresh parameters of the module that `make` builds, without Flax types. Can be traced."""
    return nnx.to_pure_dict(nnx.state(make(nnx.Rngs(key)), nnx.Param))


def param_shapes(make: Make) -> dict[str, Any]:
    """The parameters' shapes and dtypes, as a tree of `jax.ShapeDtypeStruct`."""
    return jax.eval_shape(lambda: init_params(make, jax.random.key(0)))
