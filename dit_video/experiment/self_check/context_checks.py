"""Check of context parallelism: a slice of the training that one device holds, computed by all devices and by one."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dit_video.core.errors import UserError
from dit_video.core.memory import name_exhausted_memory
from dit_video.core.trees import flatten, map_with_path
from dit_video.distributed import RowPart, shard_batch
from dit_video.experiment.denoiser import init_denoiser
from dit_video.experiment.self_check.step_checks import ValueReader
from dit_video.experiment.self_check.subject import CheckedTraining, Problem
from dit_video.models.model_config import ModelConfig
from dit_video.nn import ONE_DEVICE, Partitioner, get_graph_def
from dit_video.tokens import PackedBatch

_NAME = "context_parallel"
_LAYERS = 2
"""Number of first layers that are compared."""
_TOLERANCES = {"float32": 1e-3, "bfloat16": 0.05}
"""Largest relative difference of losses and gradients by the dtype of products."""
_MIN_SHARE = 0.01
"""Share of the median size of gradients below which a gradient is not told from its rounding."""


class _Result(NamedTuple):
    """The loss of a row, and a few values of its gradient by path."""

    loss: Array
    values: dict[str, Array]


def check_context_parallel(subject: CheckedTraining, params: Any, rows: PackedBatch) -> list[Problem]:
    """Check loss and gradient of the first row by the first layers, divided among devices, against those of one device.

    All processes call this; the first one, which has the row, compares. What cannot be compared is a problem, too,
    that says why.

    Args:
      subject: The training.
      params: Trained parameters without zeros.
      rows: A batch of this process.
    """
    mesh = subject.trainer.mesh
    if mesh.shape["context"] == 1:
        return []
    try:
        # The first process's rows, which others share if `context` spans several.
        has_row = RowPart.from_mesh(mesh).part_index == RowPart.from_mesh(mesh, process=0).part_index
        valid = np.zeros_like(np.asarray(rows.valid))
        valid[:1] = np.asarray(rows.valid)[:1] & has_row
        with name_exhausted_memory("the comparison", "It needs a row of two layers on one device."):
            model, first_layers = _take_first_layers(subject, params)
            reader = ValueReader(subject, first_layers)
            on_mesh = shard_batch(rows._replace(valid=valid), mesh)
            compute = _make_loss_and_gradient(subject, model, subject.run.partitioner, reader)
            found = jax.device_get(subject.jit(compute)(first_layers, on_mesh))
            if jax.process_index():
                return []
            own = jax.tree.map(lambda leaf: leaf.addressable_data(0), first_layers)
            first_row = jax.tree.map(lambda leaf: np.asarray(leaf)[:1], rows)
            compute = _make_loss_and_gradient(subject, model, ONE_DEVICE, reader)
            expected = jax.device_get(jax.jit(compute)(own, first_row))
    except UserError as error:
        return [Problem(_NAME, f"not checked: {error}")]
    return _compare(subject, found, expected)


def _take_first_layers(subject: CheckedTraining, params: Any) -> tuple[ModelConfig, dict[str, Any]]:
    """Return a model of the first layers, and its parameters on every device.

    Raises:
      UserError: If the model cannot have fewer layers, or parameters are not those of a model of more.
    """
    backbone = subject.model.backbone
    count = min(_LAYERS, backbone.layers)
    model = dataclasses.replace(subject.model, backbone=backbone.replace(layers=count))
    shapes = flatten(jax.eval_shape(functools.partial(init_denoiser, model), jax.random.key(0)))

    def take(params: Any, frozen: Any) -> dict[str, Any]:
        merged = subject.merge_params(params, frozen)
        return map_with_path(cut, {name: merged[name] for name in ("backbone", "text")})

    def cut(path: str, leaf: Array) -> Array:
        shape = shapes[path].shape if path in shapes else None
        if shape is None or leaf.shape[1:] != shape[1:] or leaf.shape[:1] < shape[:1]:
            raise UserError(f"{path} has no part in a model of {count} layers")
        return leaf[: shape[0]] if shape else leaf

    return model, subject.jit(take)(params, subject.frozen_params)


def _make_loss_and_gradient(
    subject: CheckedTraining, model: ModelConfig, partitioner: Partitioner, reader: ValueReader
) -> Callable[[Any, PackedBatch], _Result]:
    """Return the traceable function from parameters and rows to the result of a model made with a partitioner."""
    graph = get_graph_def(model.backbone.make, partitioner)
    loss = dataclasses.replace(subject.loss, backbone=graph, optimizer=None, auxiliary=(), is_training=False)

    def compute(params: Any, rows: PackedBatch) -> _Result:
        value, gradient = jax.value_and_grad(lambda each: loss(each, rows, jnp.int32(0)).value)(params)
        return _Result(value, reader.take(gradient))

    return compute


def _compare(subject: CheckedTraining, found: _Result, expected: _Result) -> list[Problem]:
    tolerance = _TOLERANCES.get(subject.model.backbone.dtype, _TOLERANCES["bfloat16"])
    devices = f"{subject.trainer.mesh.shape['context']} devices by {subject.run.partitioner.context_attention}"
    if not abs(found.loss - expected.loss) <= tolerance * abs(expected.loss):
        return [
            Problem(_NAME, f"the loss of the first row on {devices} is {found.loss:.5f}, on one {expected.loss:.5f}")
        ]
    sizes = {path: float(np.linalg.norm(values)) for path, values in expected.values.items()}
    smallest = _MIN_SHARE * float(np.median([size for size in sizes.values() if size] or [0.0]))
    errors = {path: float(np.linalg.norm(found.values[path] - values)) for path, values in expected.values.items()}
    wrong = [path for path, error in errors.items() if not error <= tolerance * max(sizes[path], smallest)]
    if not wrong:
        return []
    worst = max(wrong, key=lambda path: errors[path] / max(sizes[path], smallest))
    share = errors[worst] / max(sizes[worst], smallest)
    return [Problem(_NAME, f"gradients on {devices} are not those of one: {len(wrong)} differ, {worst} by {share:.1%}")]
