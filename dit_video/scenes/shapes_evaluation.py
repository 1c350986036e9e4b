"""Evaluation of models of the rendered shapes: all prompts, judged from the generated files."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dit_video.core import rng
from dit_video.evaluation.collection import MetricCollection
from dit_video.evaluation.config import RECONSTRUCTION_METRICS
from dit_video.evaluation.metrics.metric import Metric, MetricBatch
from dit_video.evaluation.protocol import EvaluationData, EvaluationItem, EvaluationProtocol, make_item_seed
from dit_video.evaluation.protocols import register_protocol
from dit_video.sampling.pipeline import Pipeline
from dit_video.sampling.request import Request
from dit_video.scenes import shapes
from dit_video.scenes.shape_metrics import ATTRIBUTES, PromptFollowing, StartSpread
from dit_video.tokens import Grid


@dataclass(frozen=True, kw_only=True)
class ShapesEvaluation(EvaluationProtocol):
    """Evaluation on all prompts of the rendered shapes, judged from the generated files."""

    name: str = "quickstart"
    metrics: tuple[Metric, ...] = (PromptFollowing(), StartSpread(), *RECONSTRUCTION_METRICS)
    crf: int | None = None
    may_only_sample = True
    example_prompts = (
        "a red circle moving left",
        "a blue square moving up",
        "a green triangle moving right",
        "a yellow circle moving down",
    )

    def make_items(self, pipeline: Pipeline, data: EvaluationData) -> list[EvaluationItem]:
        """Return all prompts, with renderings of them as references."""
        return list(map(make_shape_item, make_shape_requests(self.seed)))


def make_shape_requests(seed: int) -> list[Request]:
    """Return all 72 prompts at 17 and 9 frames, and the 18 image prompts, each once at one of three sizes."""
    prompts = [
        (frames, description)
        for frames, descriptions in ((17, shapes.COMBINATIONS), (9, shapes.COMBINATIONS), (1, shapes.IMAGES))
        for description in descriptions
    ]
    sizes = ((32, 32), (32, 48), (48, 32))
    size_indices = rng.make_generator(seed, "sample sizes").permutation(np.arange(len(prompts)) % len(sizes)).tolist()
    return [
        Request(shapes.format_caption(description), Grid(frames, *sizes[size]), seed=make_item_seed(seed, number))
        for number, ((frames, description), size) in enumerate(zip(prompts, size_indices, strict=True))
    ]


def make_shape_item(request: Request) -> EvaluationItem:
    """Return the request with a rendering of its prompt, which starts where the request's seed says."""
    description, (frames, height, width) = shapes.parse_caption(request.prompt), request.grid
    generator = rng.make_generator(request.seed, "reference")
    geometry = shapes.sample_geometry(generator, description, height=height, width=width)
    render = functools.partial(shapes.render, description, geometry, frames=frames, height=height, width=width)
    return EvaluationItem(request, render, (description, geometry), description not in shapes.HELD_OUT)


def compare_few_steps(
    teacher: Pipeline,
    student: Pipeline,
    *,
    reference_steps: int = 50,
    few_steps: Sequence[int] = (4, 2, 1),
    seeds: Sequence[int] = (0, 1, 2),
    progress: Callable[[int], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Measure how well a teacher and its distilled student follow prompts, with the same prompts and seeds.

    Each row has the number of `steps`, the rates of correct colour, direction and shape, their mean `following`,
    `spread` (of start positions relative to the data's, see `StartSpread`; the mean over directions and axes), and
    `samples`. Rows also have `following_kept` and `spread_kept`, their ratios to the teacher's at `reference_steps`.

    Args:
      teacher: Sampled with its own sampler and guidance.
      student: Sampled with its own.
      reference_steps: Number of steps of the teacher that all rows are compared with.
      few_steps: Further numbers of steps, of teacher and student.
      seeds: Seeds of the samples; each has all prompts (see `make_shape_requests`).
      progress: Called with the number of finished rows.
    """
    table: dict[str, dict[str, Any]] = {}
    for name, pipeline, steps in (
        *(("teacher", teacher, steps) for steps in (reference_steps, *few_steps)),
        *(("student", student, steps) for steps in few_steps),
    ):
        table[f"{name}, {steps} steps"] = {"steps": steps, **_measure_following(pipeline, steps, seeds)}
        if progress is not None:
            progress(len(table))
    reference = table[f"teacher, {reference_steps} steps"]
    for row in table.values():
        for figure in ("following", "spread"):
            value, best = row[figure], reference[figure]
            row[f"{figure}_kept"] = None if value is None or not best else value / best
    return table


def _measure_following(pipeline: Pipeline, steps: int, seeds: Sequence[int]) -> dict[str, Any]:
    collection, sampling = MetricCollection((PromptFollowing(), StartSpread())), pipeline.make_sampling(steps=steps)
    for seed in seeds:
        requests = make_shape_requests(seed)
        prompts = [request.prompt for request in requests]
        collection.update(MetricBatch(samples=pipeline.generate_many(requests, sampling=sampling), prompts=prompts))
    estimates = {name: result.estimate for name, result in collection.compute().items()}
    rates = {name: estimates[name].value for name in ATTRIBUTES}
    ratios = [each.value for name, each in estimates.items() if name.startswith("start_spread_")]
    known_ratios = [ratio for ratio in ratios if ratio is not None]
    return {
        **rates,
        "following": float(np.mean(list(rates.values()))),
        "spread": float(np.mean(known_ratios)) if known_ratios else None,
        "samples": estimates["colour"].count,
    }


register_protocol(ShapesEvaluation())
