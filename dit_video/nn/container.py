"""Conversion of Flax modules into a structure and a plain nested dictionary of parameters."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array

from dit_video.core.errors import UserError
from dit_video.core.trees import flatten, map_with_path

ModuleFactory = Callable[[nnx.Rngs], nnx.Module]


class ParamRngs(nnx.Rngs):
    """The random keys of `nnx.Rngs(key)`, counted in Python instead of a variable.

    `nnx.RngStream` assigns its counter at every key. Under tracing, JAX composes an error message each time, which Flax
    catches (`Tracer.sharding`, in jax 0.10 and flax 0.12). This takes half of the time to build a model.
    """

    def __init__(self, key: Array):
        self._key, self._count = nnx.data(key), 0

    def params(self) -> Array:
        """Return the next key."""
        key = jax.random.fold_in(self._key, self._count)
        self._count += 1
        return key


@functools.lru_cache(maxsize=256)
def get_graph_def(make: Callable[..., nnx.Module], *arguments: Any) -> nnx.GraphDef:
    """Return the structure of the module `make(rngs, *arguments)`, without computing a parameter.

    `nnx.merge(graph, params)` gives the module back, inside or outside of `jax.jit`.
    """
    return nnx.graphdef(nnx.eval_shape(lambda: make(ParamRngs(jax.random.key(0)), *arguments)))


def init_params(make: ModuleFactory, key: Array) -> dict[str, Any]:
    """Return fresh parameters of the module that `make` builds, without Flax types. Can be traced."""
    return nnx.to_pure_dict(nnx.state(make(ParamRngs(key)), nnx.Param))


def check_params(make: ModuleFactory, params: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters by path, checked against the shapes of the module that `make` builds.

    Raises:
      UserError: If the parameters belong to another module.
    """
    leaves, expected = flatten(params), flatten(get_param_shapes(make))
    for path in (*expected, *leaves):
        ours, implied = (tuple(tree[path].shape) if path in tree else None for tree in (leaves, expected))
        if ours != implied:
            raise UserError(f"the parameter {path} has shape {ours}, the config implies {implied}; use its parameters")
    return leaves


def complete_params(make: ModuleFactory, existing: dict[str, Any], key: Array) -> dict[str, Any]:
    """Return parameters of the module that `make` builds: existing ones by path, and fresh ones elsewhere."""

    @jax.jit  # jitted, so that the initial values of existing parameters are never computed
    def fresh(key: Array) -> dict[str, Array]:
        return {path: leaf for path, leaf in flatten(init_params(make, key)).items() if path not in existing}

    leaves = existing | fresh(key)
    return map_with_path(lambda path, _: leaves[path], get_param_shapes(make))


def get_param_shapes(make: ModuleFactory) -> dict[str, Any]:
    """Return the parameters' shapes and dtypes as a tree of `jax.ShapeDtypeStruct`."""
    return jax.eval_shape(lambda: init_params(make, jax.random.key(0)))
