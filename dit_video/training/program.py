"""Programs of training steps, as shapes: what a run compiles, without computing anything."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from dit_video.distributed import make_batch_shardings, make_shardings
from dit_video.distributed.mesh import AnyMesh
from dit_video.training.state import attach_shardings, get_shapes_on_devices
from dit_video.training.step import JittedStep, TrainStep


def make_step_program(
    train_step: TrainStep,
    init: Callable[[Array], dict[str, Any]],
    batch: PyTree,
    mesh: AnyMesh,
    *,
    constants: tuple[PyTree, ...] = (),
    frozen_params: tuple[PyTree, ...] = (),
) -> tuple[Any, tuple[PyTree, ...]]:
    """Return the jitted step of a training on a mesh, and the shapes of its arguments; nothing is computed.

    Args:
      train_step: Step of the training.
      init: Traceable function from a random key to parameters.
      batch: Global batch, or its shapes.
      mesh: Devices, which need not be present.
      constants: Constants of the step, which are replicated, or their shapes.
      frozen_params: Further constants, which are sharded like parameters.
    """
    layout = functools.partial(make_shardings, mesh=mesh)
    state = get_shapes_on_devices(lambda key: train_step.init(init(key)), shardings=layout)
    arguments = (
        state,
        attach_shardings(batch, make_batch_shardings(batch, mesh)),
        attach_shardings((*constants, *frozen_params), make_constant_shardings(constants, frozen_params, mesh)),
    )
    return JittedStep(train_step.update).get_program(state), arguments


def make_constant_shardings(
    constants: tuple[PyTree, ...], frozen_params: tuple[PyTree, ...], mesh: AnyMesh
) -> tuple[PyTree, ...]:
    """Return the shardings of `(*constants, *frozen_params)`, the last arguments of a step."""
    replicated = NamedSharding(mesh, PartitionSpec())
    return (*jax.tree.map(lambda _: replicated, constants), *make_shardings(frozen_params, mesh))
