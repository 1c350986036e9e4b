"""Checks of the initial weights, which are read from their files a second time, and of what an adapter trains."""

import re
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dit_video.core.trees import flatten
from dit_video.distributed import shard_batch
from dit_video.experiment.initial_weights import get_kernel_dtype, load_initial_denoiser
from dit_video.experiment.self_check.problems import Problem
from dit_video.experiment.self_check.state_values import StateValues, ValueReader
from dit_video.experiment.self_check.step_checks import compute_learning_rate
from dit_video.experiment.self_check.subject import CheckedTraining
from dit_video.tokens import PackedBatch
from dit_video.weights.parameter import Parameter

_LOSS_TOLERANCE = 1e-3
_MAX_READ = 12
"""Number of parameters that are read again."""


class _ReadingPlacer:
    """Reads a few values of some parameters, and passes over the others."""

    def __init__(self, subject: CheckedTraining, reader: ValueReader, paths: list[str]):
        self.kernel_dtype = get_kernel_dtype(subject.experiment.denoiser)
        self._reader, self._paths = reader, set(paths)

    def __call__(self, path: str, parameter: Parameter) -> np.ndarray:
        if path not in self._paths:
            return np.zeros(0)
        return np.asarray(self._reader.take_from(path, parameter.to_host()), np.float64)


def check_initial_weights(
    subject: CheckedTraining, reader: ValueReader, values: StateValues, frozen: dict[str, Any] | None
) -> list[Problem]:
    """Check parameters after the first step against the files that a training begins with, where it has any.

    Args:
      subject: The training.
      reader: Reader of values of parameters.
      values: Values after the first step.
      frozen: Weights that adapters change, or a teacher's.
    """
    training = subject.experiment.denoiser
    start = training.train.init_from
    if start is None:
        return []
    config = training.optimizer
    leaves = frozen if subject.trained.lora is not None else None
    own = ValueReader(subject, leaves) if leaves is not None else reader
    params = values["params"] if leaves is None else own.read_values(leaves)
    generator = subject.make_generator("initial weights")
    paths = [str(path) for path in generator.permutation(sorted(params))[:_MAX_READ]]
    stored = flatten(load_initial_denoiser(training, start, _ReadingPlacer(subject, own, paths)))  # type: ignore[arg-type]
    rate = compute_learning_rate(config, training.steps, 0)
    problems = []
    for path in paths:
        if path not in stored or not len(stored[path]):
            continue
        moves = subject.is_trained(path) and leaves is None
        slack = (2 * rate * (1 + config.weight_decay * np.abs(stored[path])) if moves else 0) + 0.005 * np.abs(
            stored[path]
        )
        if (np.abs(params[path] - stored[path]) > slack + 1e-6).any():
            problems.append(Problem("initial_weights", f"{path} is not that of {start}"))
    return problems


def check_adapter_scale(subject: CheckedTraining, params: Any, rows: PackedBatch, loss: float) -> list[Problem]:
    """Check the loss of a step against that of the model with the adapter attached by the config's scale.

    Args:
      subject: The training.
      params: Trained factors, none of which are zero.
      rows: A batch of this process.
      loss: Loss of the step at step 0.
    """
    if subject.trained.lora is None:
        return []

    def compute(params: Any, frozen: Any, rows: PackedBatch) -> Array:
        return subject.loss(subject.merge_params(params, frozen), rows, jnp.int32(0)).value

    on_devices = shard_batch(rows, subject.trainer.mesh)
    expected = float(subject.jit(compute)(params, subject.frozen_params, on_devices))
    if abs(loss - expected) <= _LOSS_TOLERANCE * abs(expected):
        return []
    return [Problem("adapter", f"the loss is {loss:.4f}, with the adapter at the scale of the config {expected:.4f}")]


def check_adapter_paths(subject: CheckedTraining, params: Any) -> list[Problem]:
    """Check that the training of an adapter trains the factors of its targets, and nothing else."""
    lora = subject.trained.lora
    if lora is None:
        return []
    problems = []
    for path in flatten(params):
        layer, _, factor = path.rpartition("/")
        if factor not in ("a", "b") or not any(re.search(pattern, layer) for pattern in lora.targets):
            problems.append(Problem("adapter", f"{path} is trained, but is no factor of the adapter"))
    return problems
