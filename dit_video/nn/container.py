"""Modules as containers: a structure, and parameters as a plain nested dictionary."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array

from dit_video.core.errors import UserError
from dit_video.core.trees import flatten, map_with_path

Make = Callable[[nnx.Rngs], nnx.Module]


def graph_of(make: Make) -> nnx.GraphDef:
    """The structure of the module that `make` builds, without computing a parameter.

    `nnx.merge(graph, params)` gives the module back, inside or outside of `jax.jit`.
    """
    return nnx.graphdef(nnx.eval_shape(lambda: make(nnx.Rngs(jax.random.key(0)))))


def init_params(make: Make, key: Array) -> dict[str, Any]:
    """Fresh parameters of the module that `make` builds, without Flax types. Can be traced."""
    return nnx.to_pure_dict(nnx.state(make(nnx.Rngs(key)), nnx.Param))


def checked_params(make: Make, params: dict[str, Any]) -> dict[str, Any]:
    """The parameters of the module that `make` builds, by path.

    Raises:
      UserError: they are another module's.
    """
    given, wanted = flatten(params), flatten(param_shapes(make))
    for path in (*wanted, *given):
        shapes = [tuple(leaves[path].shape) if path in leaves else None for leaves in (given, wanted)]
        if shapes[0] != shapes[1]:
            raise UserError(f"{path} has the shape {shapes[0]} in the parameters and {shapes[1]} by the config")
    return given


def completed_params(make: Make, given: dict[str, Any], key: Array) -> dict[str, Any]:
    """Parameters of the module that `make` builds: those `given` by path, and fresh ones where there are none."""

    @jax.jit  # in which what is given already is not computed
    def fresh(key: Array) -> dict[str, Array]:
        return {path: leaf for path, leaf in flatten(init_params(make, key)).items() if path not in given}

    leaves = given | fresh(key)
    return map_with_path(lambda path, _: leaves[path], param_shapes(make))


def param_shapes(make: Make) -> dict[str, Any]:
    """The parameters' shapes and dtypes, as a tree of `jax.ShapeDtypeStruct`."""
    return jax.eval_shape(lambda: init_params(make, jax.random.key(0)))
