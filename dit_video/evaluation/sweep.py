"""Sweep over guidance scales and numbers of steps, with the quality and the cost of each."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from dit_video.core.errors import UserError
from dit_video.core.files import read_json, write_json
from dit_video.distributed.gather import is_first_process
from dit_video.evaluation.comparison import Comparison, compare
from dit_video.evaluation.evaluate import evaluate
from dit_video.evaluation.protocol import EvaluationData, EvaluationProtocol
from dit_video.sampling import Sampling
from dit_video.sampling.pipeline import Pipeline

COST_FILE = "cost.json"


class SweepPoint(NamedTuple):
    """Sampling at one point of a sweep, and its cost."""

    steps: int
    guidance: float
    seconds: float | None
    """Seconds of sampling for all samples, including compilation; None if they were not made in one go."""


class Sweep(NamedTuple):
    """Points of a sweep, with their values."""

    points: tuple[SweepPoint, ...]
    comparison: Comparison


def sweep_sampling(
    pipeline: Pipeline,
    protocol: EvaluationProtocol,
    folder: str | Path,
    *,
    steps: Sequence[int],
    guidance: Sequence[float],
    data: EvaluationData | None = None,
    sampling: Sampling | None = None,
    on_point: Callable[[int, float], None] | None = None,
) -> Sweep:
    """Evaluate a model by one protocol at every number of steps and guidance scale.

    Each point has its own folder, `steps_N_guidance_S`. Existing samples are not made or timed again, so that the cost
    of a point that was interrupted is unknown.

    Args:
      pipeline: The model.
      protocol: What is sampled and measured.
      folder: Folder of the points.
      steps: Numbers of steps.
      guidance: Guidance scales.
      data: Data clips, if the protocol needs them.
      sampling: Sampling whose steps and guidance scale are replaced; the pipeline's own by default.
      on_point: Called with the steps and the scale before each point.

    Raises:
      UserError: If there are fewer than two points, the protocol compares reconstructions, or `evaluate` raises
        it.
    """
    if len(steps) * len(guidance) < 2:
        raise UserError(f"steps={list(steps)} and guidance={list(guidance)} are one point. Use two or more")
    if protocol.is_reconstruction:
        raise UserError(f"protocol={protocol.name!r} is invalid: it samples nothing. Use one with samples")
    points, folders = [], []
    for scale in guidance:
        for count in steps:
            if on_point is not None:
                on_point(count, scale)
            point = Path(folder) / f"steps_{count}_guidance_{scale:g}"
            changed = pipeline.make_sampling(sampling, steps=count, guidance=scale)
            points.append(_evaluate(pipeline, protocol, point, data, changed, scale))
            folders.append(point)
    return Sweep(tuple(points), compare(folders, ignored=("sampling",)))


def _evaluate(
    pipeline: Pipeline,
    protocol: EvaluationProtocol,
    folder: Path,
    data: EvaluationData | None,
    sampling: Sampling,
    guidance: float,
) -> SweepPoint:
    result = evaluate(pipeline, protocol, folder, data=data, sampling=sampling)
    path = folder / COST_FILE
    if result.seconds is not None and is_first_process():
        write_json(path, {"seconds": result.seconds})
    return SweepPoint(sampling.steps, guidance, read_json(path)["seconds"] if path.is_file() else None)
