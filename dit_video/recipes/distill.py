"""Distillation of any checkpoint into few steps: the experiment that it gives, and what a student has lost."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dit_video.core.errors import UserError
from dit_video.data.synthetic import shapes
from dit_video.diffusion import FlowMatching, Lcm
from dit_video.evaluation.evaluate import shape_requests
from dit_video.evaluation.metrics.prompt_following import Result, examine, prompt_following
from dit_video.experiment import Data, DenoiserTraining, Experiment, GivenAutoencoder
from dit_video.experiment.folder import CONFIG as RUN
from dit_video.experiment.run import Run
from dit_video.generation import Sampling
from dit_video.pipelines.pipeline import CONFIG as PIPELINE
from dit_video.pipelines.pipeline import Pipeline, load_pipeline
from dit_video.tokens import RowShape
from dit_video.training.losses.distillation import ConsistencyDistillation, Distillation, DistributionMatching
from dit_video.training.optim.optimizer import OptimizerConfig

RATES = {"consistency": 1e-3, "dmd": 3e-4}
ATTRIBUTES = ("colour", "direction", "shape")


@dataclass(frozen=True, kw_only=True)
class Distilling:
    """How a teacher is distilled."""

    method: Literal["consistency", "dmd"] = "consistency"
    """`consistency`: latent consistency. `dmd`: distribution matching (DMD2), which needs no data but their captions
    and sizes."""
    steps: int = 1000
    sampling_steps: int = 4
    """of the student"""
    guidance: float | None = None
    """of the teacher, which the student learns to do without; the teacher's own by default"""
    intervals: int = 32
    """of consistency: how many steps the teacher takes from noise to data"""
    critic_steps: int = 5
    """of distribution matching: how often the critic moves for each time that the student does"""
    batch: int | None = None
    """rows of a step; as many as the teacher's by default"""
    optimizer: Literal["adamw", "muon"] = "muon"
    learning_rate: float | None = None
    """1e-3 of consistency, 3e-4 of distribution matching by default"""
    warmup: int = 20
    ema_decay: float = 0.98
    """of the moving average, which is consistency's target and what is sampled from in the end"""
    seed: int = 0
    log_every: int = 20
    save_every: int = 200


def distilling(folder: str | os.PathLike, options: Distilling = Distilling()) -> Experiment:
    """The experiment that distils the denoiser of a run or a pipeline; its autoencoder is used as it is.

    Args:
      folder: of a run that has its pipeline, or of a pipeline.
      options: how.

    Raises:
      MissingError: no such folder.
      UserError: a model of two experts, one that is told of known frames, or options that don't fit it.
    """
    folder = Path(folder)
    run = Run.open(folder).experiment if (folder / RUN).is_file() else None
    start = folder if (folder / PIPELINE).is_file() else folder / "pipeline"
    config = load_pipeline(start).config
    if config.boundary is not None or config.dit.given_channels or config.dit.time == "token":
        raise UserError(
            f"{folder} holds a model of two experts, or one that is told of known frames; distil a text-to-video model "
            "of one denoiser"
        )
    scale = config.sampling.guidance if options.guidance is None else options.guidance
    if not isinstance(scale, float | int):
        raise UserError(f"the teacher's guidance is one scale when it is distilled, not {scale}; give --guidance")
    autoencoder: Any = config.autoencoder
    objective = FlowMatching(process=config.process, prediction=config.prediction)
    data = Data(max_pixels=config.size.h * config.size.w, max_frames=config.size.t, fps=config.fps)
    return Experiment(
        name=f"{'shapes' if run is None else run.name}-{options.method}",
        seed=options.seed,
        data=data if run is None else run.data,
        autoencoder=GivenAutoencoder(model=autoencoder, folder=os.fspath(start)),
        denoiser=DenoiserTraining(
            dit=config.dit,
            text=config.text,
            rows=config.rows or RowShape(tokens=_largest(config), text=config.text.max_tokens, segments=1),
            batch=options.batch or config.batch,
            optimizer=OptimizerConfig(
                kind=options.optimizer,
                learning_rate=RATES[options.method] if options.learning_rate is None else options.learning_rate,
                matrix_scale=0.5,
                schedule="wsd",
                warmup=min(options.warmup, options.steps - 1),
            ),
            steps=options.steps,
            objective=objective if run is None else run.denoiser.objective,
            ema_decay=options.ema_decay,
            start=os.fspath(start),
            distillation=_method(options, scale),
        ),
        sampling=Sampling(steps=options.sampling_steps, guidance=1.0, solver=Lcm()),
        evaluation=config.evaluation,
        log_every=options.log_every,
        save_every=options.save_every,
    )


def _method(options: Distilling, guidance: float) -> Distillation:
    if options.method == "consistency":
        return ConsistencyDistillation(guidance=guidance, intervals=options.intervals)
    return DistributionMatching(guidance=guidance, steps=options.sampling_steps, critic_steps=options.critic_steps)


def _largest(config: Any) -> int:
    grid, patch = config.latent_grid(config.size), config.dit.patch
    return grid.volume // patch.volume


def compare(
    teacher: Pipeline,
    student: Pipeline,
    *,
    full: int = 50,
    few: Sequence[int] = (4, 2, 1),
    seeds: Sequence[int] = (0, 1, 2),
    progress: Callable[[int], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """How teacher and student of the rendered shapes follow prompts, by their steps: the same prompts and seeds.

    Every row has `steps`, the rates of colour, direction and shape, their mean `following`, `spread` (of start
    positions, in the data's: see `start_spread`; the mean over directions and axes), and `samples`. Rows of the student
    also have `following_kept` and `spread_kept`, their shares of what the teacher has at `full` steps.

    Args:
      teacher: sampled by its own sampler and guidance.
      student: sampled by its own.
      full: steps of the teacher that the student is measured by.
      few: steps of both.
      seeds: of the samples; each has every prompt (see `measure.shape_requests`).
      progress: is called with the number of rows that are done.
    """
    table: dict[str, dict[str, Any]] = {}
    for name, pipeline, steps in (
        *(("teacher", teacher, steps) for steps in (full, *few)),
        *(("student", student, steps) for steps in few),
    ):
        table[f"{name}, {steps} steps"] = {"steps": steps, **_figures(pipeline, steps, seeds)}
        if progress is not None:
            progress(len(table))
    reference = table[f"teacher, {full} steps"]
    for row in table.values():
        for figure in ("following", "spread"):
            row[f"{figure}_kept"] = _share(row[figure], reference[figure])
    return table


def _share(part: float | None, whole: float | None) -> float | None:
    return None if part is None or not whole else part / whole


def _figures(pipeline: Pipeline, steps: int, seeds: Sequence[int]) -> dict[str, Any]:
    results: list[Result] = []
    for seed in seeds:
        requests = shape_requests(seed)
        clips = pipeline.generate_many(requests, steps=steps)
        results += [examine(shapes.parse(request.prompt), clip) for request, clip in zip(requests, clips, strict=True)]
    found = prompt_following(results)
    rates = {name: found["all"][name]["rate"] for name in ATTRIBUTES}
    entries = [entry for entry in found["start_spread"].values() if isinstance(entry, dict)]
    ratios = [entry[axis]["ratio"] for entry in entries for axis in ("vertical", "horizontal")]
    known = [ratio for ratio in ratios if ratio is not None]
    return {
        **rates,
        "following": float(np.mean(list(rates.values()))),
        "spread": float(np.mean(known)) if known else None,
        "samples": len(results),
    }
