"""Checks of a student: which weights each of its losses moves, and the times that it is trained and sampled at."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from dit_video.core.trees import flatten
from dit_video.diffusion import ClipSize
from dit_video.distributed import make_shardings, shard_batch
from dit_video.experiment.self_check.model_checks import perturb
from dit_video.experiment.self_check.subject import CheckedTraining, Problem
from dit_video.tokens import PackedBatch
from dit_video.training.losses.denoiser import get_clip_sizes
from dit_video.training.losses.distillation import DistributionMatching, StudentStep

_STEPS = 512
"""Number of steps whose times are drawn."""
_TOLERANCE = 1e-3
"""Largest difference of two times that count as the same."""
_SHOWN = 6
"""Number of times in a message."""

Moved = Mapping[str, Mapping[str, bool]]
"""Whether each parameter has a gradient, by the name of the parameters and their paths."""


def find_moved(subject: CheckedTraining, step: StudentStep, state: Any, rows: PackedBatch) -> Mapping[str, Moved]:
    """Return what each loss of a student's step has a gradient for, at parameters without zeros that all differ."""
    mesh = subject.trainer.mesh

    def compute(params: dict[str, Any], rows: PackedBatch, teacher: Any) -> dict[str, Moved]:
        moved = dict[str, Moved]()
        for name, loss in step.losses.items():
            gradients = jax.grad(lambda each, loss=loss: loss(each, rows, jnp.int32(0), teacher)[0])(params)
            moved[name] = {
                other: {path: (leaf != 0).any() for path, leaf in flatten(gradient).items()}
                for other, gradient in gradients.items()
            }
        return moved

    params = step.get_params(state)
    params = subject.jit(perturb, make_shardings(params, mesh))(params)
    moved = subject.jit(compute)(params, shard_batch(rows, mesh), *subject.frozen_params)
    return jax.tree.map(bool, jax.device_get(moved))


def check_moved(subject: CheckedTraining, moved: Mapping[str, Moved]) -> list[Problem]:
    """Check that each loss moves all the parameters that it is named after, and no others."""
    problems = []
    for name, gradients in moved.items():
        for other, paths in gradients.items():
            if other != name and (wrong := [path for path, is_moved in paths.items() if is_moved]):
                message = f"the loss of the {name} has a gradient for the {other}: {wrong[0]}"
                problems.append(Problem("gradient", message))
        problems += [
            Problem("trained_parameters", f"{path} of the {name} is trained, but its loss does not move it")
            for path, is_moved in gradients[name].items()
            if subject.is_trained(path) and not is_moved
        ]
    return problems


def check_times(subject: CheckedTraining, step: StudentStep, rows: PackedBatch) -> list[Problem]:
    """Check that a student is trained at the times at which its steps start in sampling.

    A student of distribution matching is trained at no others, as it has a fixed number of steps.
    """

    def draw(rows: PackedBatch) -> tuple[Float[jax.Array, "s B N"], ClipSize]:
        draw_times = jax.vmap(lambda number: step.loss.draw_time(rows, number)[..., 0])
        return draw_times(jnp.arange(_STEPS)), get_clip_sizes(rows)

    drawn, sizes = jax.tree.map(np.asarray, subject.jit(draw)(shard_batch(rows, subject.trainer.mesh)))
    segments = np.asarray(rows.segments)
    if drawn.shape[1] != len(segments):
        return []  # other processes have rows of their own
    sampling, is_matching = subject.run.experiment.sampling, isinstance(step.loss.config, DistributionMatching)
    trained_at = dict[ClipSize, np.ndarray]()
    for row, index in np.argwhere(np.asarray(rows.valid)):
        size = ClipSize(*(int(part[row, index]) for part in sizes))
        trained_at[size] = np.unique(drawn[:, row, segments[row] == index + 1])
    for size, trained in trained_at.items():
        sampled = np.asarray(sampling.make_times(subject.model.process.specialize(size)).times)[:-1]
        if len(unknown := _find_others(sampled, trained)):
            message = (
                f"steps of sampling start at times {_format(unknown)}; the student is trained at {_format(trained)}"
            )
            return [Problem("times", message)]
        if is_matching and len(unused := _find_others(trained, sampled)):
            message = (
                f"the student is trained at times {_format(unused)}; steps of sampling start at {_format(sampled)}"
            )
            return [Problem("times", message)]
    return []


def _find_others(times: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Return the times that are not among the known ones."""
    return times[np.abs(times[:, None] - known).min(axis=1) > _TOLERANCE]


def _format(times: np.ndarray) -> str:
    shown = [f"{time:.3f}" for time in np.sort(times)[::-1]]
    return ", ".join([*shown[:_SHOWN], "…"] if len(shown) > _SHOWN else shown)
