"""Checks of gradients: against finite differences, and whether they reach every parameter that the loss depends on."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from dit_video.core.trees import flatten, map_with_path
from dit_video.distributed import make_shardings, shard_batch
from dit_video.experiment.self_check.model_checks import NOISE, make_noise
from dit_video.experiment.self_check.problems import Problem
from dit_video.experiment.self_check.state_values import COUNT, ValueReader
from dit_video.experiment.self_check.subject import CheckedTraining
from dit_video.tokens import PackedBatch

_CHANGE = 1e-3
"""Relative change of the loss that a finite difference aims at."""
_MIN_CHANGE = 5e-5
"""Relative change below which rounding of float32 hides the difference."""
_MAX_STEP = 1e-2
_TOLERANCE = 0.1
_STACKED_PATHS = re.compile(r"(^|/)(\w+_)?blocks/")
"""Parameters with a leading axis of layers."""
_MAX_LEAVES = 16
"""Number of parameters without a gradient for which the loss is computed again."""


class Gradient(NamedTuple):
    """A few values of the gradient of a batch."""

    values: Mapping[str, np.ndarray]
    """Values at the places of the reader, by path."""
    norm: float
    is_used: Mapping[str, np.ndarray]
    """Whether any value of a parameter's gradient is not zero; of stacked layers for each of them."""
    slope: float
    """Derivative of the loss in the direction of the signs of `values`."""


class GradientProbe:
    """The gradient of a training's loss, computed over the microbatches one after the other.

    Args:
      subject: The training.
      loss: Loss of the step, a function of the trained parameters.
      reader: Reader of the values.
    """

    def __init__(self, subject: CheckedTraining, loss: Any, reader: ValueReader, params: Any):
        self._subject, self._loss, self._reader = subject, loss, reader
        self._num_parts = subject.experiment.denoiser.accumulation_steps
        layout = make_shardings(params, subject.trainer.mesh)
        self._differentiate = subject.jit(self._compute_part, (layout, subject.replicated))
        self._summarize = subject.jit(self._summarize_tree)
        self._evaluate = subject.jit(self._compute_loss)

    def compute(self, params: Any, rows: PackedBatch, step: int) -> Gradient:
        """Return the gradient of a batch of this process."""
        total, weight = None, 0.0
        for part in range(self._num_parts):
            arguments = params, self._subject.frozen_params, self._take_part(rows, part), np.int32(step)
            gradients, count = self._differentiate(*arguments)
            total = gradients if total is None else jax.tree.map(jnp.add, total, gradients)
            weight += float(count)
        values, norm, is_used, slope = jax.device_get(self._summarize(total, np.float32(max(weight, 1.0))))
        return Gradient(
            {path: np.asarray(each, np.float64) for path, each in values.items()}, float(norm), is_used, float(slope)
        )

    def evaluate(
        self, params: Any, rows: PackedBatch, step: int, signs: Mapping[str, np.ndarray], size: float, changed: str = ""
    ) -> float:
        """Return the loss at parameters that are moved by signs at the sampled places, with one of them changed."""
        flags = {path: np.float32(path == changed) for path in signs}
        values = {path: np.asarray(each, np.float32) for path, each in signs.items()}
        total, weight = 0.0, 0.0
        for part in range(self._num_parts):
            arguments = self._take_part(rows, part), np.int32(step), values, np.float32(size), flags
            loss, count = jax.device_get(self._evaluate(params, self._subject.frozen_params, *arguments))
            total += float(count) * float(loss)
            weight += float(count)
        return total / max(weight, 1.0)

    def compute_loss(self, params: Any, rows: PackedBatch, step: int) -> float:
        """Return the loss of a batch of this process."""
        signs = {path: np.zeros(COUNT if leaf.ndim else (), np.float32) for path, leaf in flatten(params).items()}
        return self.evaluate(params, rows, step, signs, 0.0)

    def _take_part(self, rows: PackedBatch, part: int) -> PackedBatch:
        """Return a microbatch on the devices."""
        microbatch = jax.tree.map(lambda leaf: np.asarray(leaf)[part :: self._num_parts], rows)
        return shard_batch(microbatch, self._subject.trainer.mesh)

    def _compute_part(self, params, frozen, rows, step):
        """Return the gradient of a microbatch, times its number of clips, and that number."""
        gradients = jax.grad(lambda each: self._loss(each, rows, step, *frozen)[0])(params)
        count = jnp.asarray(rows.valid).sum().astype(jnp.float32)
        return jax.tree.map(lambda leaf: count * leaf.astype(jnp.float32), gradients), count

    def _summarize_tree(self, total, weight):
        gradients = jax.tree.map(lambda leaf: leaf / weight, total)
        values = self._reader.take(gradients)
        direction = self._reader.scatter(gradients, {path: jnp.sign(each) for path, each in values.items()})
        slope = sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(direction), strict=True))
        norm = jnp.sqrt(sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(gradients)))
        return values, norm, {path: _is_used(path, leaf) for path, leaf in flatten(gradients).items()}, slope

    def _compute_loss(self, params, frozen, rows, step, signs, size, flags):
        """Return the loss at moved parameters, and the number of clips."""
        direction = flatten(self._reader.scatter(params, signs))

        def move(path: str, leaf: Array) -> Array:
            noise = flags[path] * NOISE * make_noise(f"{path}, moved", leaf.shape)
            return (leaf + size * direction[path] + noise).astype(leaf.dtype)

        return self._loss(map_with_path(move, params), rows, step, *frozen)[0], jnp.asarray(rows.valid).sum()


def _is_used(path: str, gradient: Array) -> Bool[Array, "*layers"]:
    is_stacked = _STACKED_PATHS.search(path) and gradient.ndim > 1
    return (gradient != 0).any(axis=tuple(range(1 if is_stacked else 0, gradient.ndim)))


def check_gradient(
    subject: CheckedTraining, probe: GradientProbe, params: Any, rows: PackedBatch
) -> tuple[list[Problem], Mapping[str, bool]]:
    """Check the gradient of a batch of this process, at parameters none of which are zero.

    Returns:
      The problems, and whether the loss depends on each parameter.
    """
    gradient = probe.compute(params, rows, 0)
    signs = {path: np.sign(each) for path, each in gradient.values.items()}
    loss = probe.evaluate(params, rows, 0, signs, 0.0)
    problems = []
    is_adapter = subject.trained.lora is not None
    used = {path: bool(is_used.any()) for path, is_used in gradient.is_used.items()}
    trained = [path for path in used if subject.is_trained(path)]
    idle = [path for path in trained if not used[path]]
    for path in trained:
        if used[path] and not gradient.is_used[path].all():
            layers = np.flatnonzero(~gradient.is_used[path]).tolist()
            problems.append(Problem("gradient", f"layers {layers} of {path} have no gradient"))
    for path in idle[:_MAX_LEAVES]:
        if probe.evaluate(params, rows, 0, signs, 0.0, path) != loss:
            problems.append(Problem("gradient", f"the loss depends on {path}, but its gradient is zero"))
            used[path] = True
        else:
            check = "adapter" if is_adapter else "trained_parameters"
            problems.append(Problem(check, f"{path} is trained, but the loss does not depend on it"))
    if subject.experiment.denoiser.backbone.dtype == "float32" and gradient.slope > 0:
        size = min(_MAX_STEP, _CHANGE * abs(loss) / (2 * gradient.slope))
        expected = 2 * size * gradient.slope
        if expected > _MIN_CHANGE * abs(loss):
            actual = probe.evaluate(params, rows, 0, signs, size) - probe.evaluate(params, rows, 0, signs, -size)
            if abs(actual / expected - 1) > _TOLERANCE:
                message = f"the loss changes by {actual:.3g} where its gradient says {expected:.3g}"
                problems.append(Problem("gradient", message))
    return problems, used
