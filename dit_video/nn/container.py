"""Conversion of Flax modules into a structure and parameters in a plain nested dictionary."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array

from dit_video.core.errors import UserError
from dit_video.core.trees import flatten, map_with_path

ModuleFactory = Callable[[nnx.Rngs], nnx.Module]


def get_graph_def(make: ModuleFactory) -> nnx.GraphDef:
    """Return the structure of the module that `make` builds, without computing a parameter.

    `nnx.merge(graph, params)` gives the module back, inside or outside of `jax.jit`.
    """
    return nnx.graphdef(nnx.eval_shape(lambda: make(nnx.Rngs(jax.random.key(0)))))


def init_params(make: ModuleFactory, key: Array) -> dict[str, Any]:
    """Return fresh parameters of the module that `make` builds, without Flax types. Can be traced."""
    return nnx.to_pure_dict(nnx.state(make(nnx.Rngs(key)), nnx.Param))


def check_params(make: ModuleFactory, params: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters by path, checked against the shapes of the module that `make` builds.

    Raises:
      UserError: the parameters are those of another module.
    """
    leaves, expected = flatten(params), flatten(get_param_shapes(make))
    for path in (*expected, *leaves):
        ours, implied = (tuple(tree[path].shape) if path in tree else None for tree in (leaves, expected))
        if ours != implied:
            raise UserError(f"the parameter {path} has shape {ours}, the config implies {implied}; use its parameters")
    return leaves


def complete_params(make: ModuleFactory, existing: dict[str, Any], key: Array) -> dict[str, Any]:
    """Return parameters of the module that `make` builds: existing ones by path, and fresh ones for all others."""

    @jax.jit  # jitted, so that the initial values of existing parameters are never computed
    def fresh(key: Array) -> dict[str, Array]:
        return {path: leaf for path, leaf in flatten(init_params(make, key)).items() if path not in existing}

    leaves = existing | fresh(key)
    return map_with_path(lambda path, _: leaves[path], get_param_shapes(make))


def get_param_shapes(make: ModuleFactory) -> dict[str, Any]:
    """Return the parameters' shapes and dtypes as a tree of `jax.ShapeDtypeStruct`."""
    return jax.eval_shape(lambda: init_params(make, jax.random.key(0)))
