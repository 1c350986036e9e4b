"""Distillation of any checkpoint into a few-step student: its experiment, and a comparison of teacher and student."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dit_video.core.errors import UserError
from dit_video.diffusion import FlowMatching, Lcm
from dit_video.distributed import MeshConfig
from dit_video.evaluation.collection import MetricCollection
from dit_video.evaluation.config import CaptionEvaluation
from dit_video.evaluation.metrics.metric import MetricBatch
from dit_video.evaluation.metrics.prompt_following import PromptFollowing
from dit_video.evaluation.metrics.start_spread import StartSpread
from dit_video.evaluation.requests import make_shape_requests
from dit_video.experiment import DataConfig, DenoiserTraining, Experiment, PretrainedAutoencoder, Student
from dit_video.experiment.folder import CONFIG as RUN
from dit_video.experiment.run import Run
from dit_video.generation import Sampling
from dit_video.nn import Remat
from dit_video.nn.attention import BackendName
from dit_video.pipelines.folder import is_pipeline_folder, read_pipeline_config
from dit_video.pipelines.pipeline import Pipeline
from dit_video.tokens import PackedShape
from dit_video.training.losses.distillation import ConsistencyDistillation, Distillation, DistributionMatching
from dit_video.training.optim.optimizer import OptimizerConfig

LEARNING_RATES = {"consistency": 1e-3, "dmd": 3e-4}
ATTRIBUTES = ("colour", "direction", "shape")


@dataclass(frozen=True, kw_only=True)
class DistillationOptions:
    """Options of the distillation of a teacher."""

    method: Literal["consistency", "dmd"] = "consistency"
    """Distillation method. `consistency`: latent consistency. `dmd`: distribution matching (DMD2), whose only data are
    captions and sizes."""
    steps: int = 1000
    sampling_steps: int = 4
    """Number of sampling steps of the student."""
    guidance: float | None = None
    """Guidance scale of the teacher, which the student learns to imitate without guidance; the teacher's own by
    default."""
    intervals: int = 32
    """Number of steps that the teacher takes from noise to data; `consistency` only."""
    critic_steps: int = 5
    """Number of critic updates for each update of the student; `dmd` only."""
    batch: int | None = None
    """Number of rows of a step; the teacher's by default."""
    remat: Remat | None = None
    """Activations that are kept for the backward pass; the teacher's choice by default."""
    attention: BackendName | None = None
    """Backend of attention; the teacher's by default, where `auto` chooses by platform."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """Number of devices along each axis of the mesh, on which the student is trained and sampled."""
    optimizer: Literal["adamw", "muon"] = "muon"
    learning_rate: float | None = None
    """Learning rate; by default 1e-3 for `consistency` and 3e-4 for `dmd`."""
    warmup: int = 20
    ema_decay: float = 0.98
    """Decay of the moving average, which is the target of `consistency` and the final student."""
    seed: int = 0
    log_every: int = 20
    save_every: int = 200


def make_distillation_experiment(
    folder: str | os.PathLike, options: DistillationOptions = DistillationOptions()
) -> Experiment:
    """Return the experiment that distils the denoiser of a run or a pipeline, whose autoencoder is used unchanged.

    Args:
      folder: a run that has its pipeline, or a pipeline.
      options: options of the distillation.

    Raises:
      MissingError: the folder does not exist.
      UserError: a model with two experts or with conditioning frames, or options that do not fit it.
    """
    folder = Path(folder)
    run = Run.open(folder).experiment if (folder / RUN).is_file() else None
    start = folder if is_pipeline_folder(folder) else folder / "pipeline"
    config = read_pipeline_config(start)
    if config.boundary is not None or config.backbone.cond_channels or config.backbone.time == "token":
        fix = "distil a text-to-video model with one denoiser"
        raise UserError(f"{folder} holds a model with two experts or with conditioning frames; {fix}")
    scale = config.sampling.guidance if options.guidance is None else options.guidance
    if not isinstance(scale, float | int):
        raise UserError(f"guidance={scale} is invalid: a teacher is distilled at one scale; set it with --guidance")
    autoencoder: Any = config.autoencoder
    objective = FlowMatching(process=config.process, prediction=config.prediction)
    data = DataConfig(max_pixels=config.size.h * config.size.w, max_frames=config.size.t, fps=config.fps)
    max_tokens = config.latent_grid(config.size).volume // config.backbone.patch.volume
    changes = {"remat": options.remat, "attention": options.attention}
    changes = {name: value for name, value in changes.items() if value is not None}
    default_rate = LEARNING_RATES[options.method]
    return Experiment(
        name=f"{'shapes' if run is None else run.name}-{options.method}",
        seed=options.seed,
        data=data if run is None else run.data,
        autoencoder=PretrainedAutoencoder(model=autoencoder, folder=os.fspath(start)),
        denoiser=DenoiserTraining(
            backbone=config.backbone.replace(**changes),
            text=config.text,
            layout=config.layout or PackedShape(tokens=max_tokens, text=config.text.max_tokens, segments=1),
            batch=options.batch or config.batch,
            optimizer=OptimizerConfig(
                kind=options.optimizer,
                learning_rate=default_rate if options.learning_rate is None else options.learning_rate,
                muon_rms=0.5,
                schedule="wsd",
                warmup=min(options.warmup, options.steps - 1),
            ),
            steps=options.steps,
            objective=objective if run is None else run.denoiser.objective,
            ema_decay=options.ema_decay,
            train=Student(init_from=os.fspath(start), distillation=_make_distillation(options, scale)),
        ),
        sampling=Sampling(steps=options.sampling_steps, guidance=1.0, solver=Lcm()),
        evaluation=config.evaluation or CaptionEvaluation(),
        mesh=options.mesh,
        log_every=options.log_every,
        save_every=options.save_every,
    )


def _make_distillation(options: DistillationOptions, guidance: float) -> Distillation:
    if options.method == "consistency":
        return ConsistencyDistillation(guidance=guidance, intervals=options.intervals)
    return DistributionMatching(guidance=guidance, steps=options.sampling_steps, critic_steps=options.critic_steps)


def compare(
    teacher: Pipeline,
    student: Pipeline,
    *,
    reference_steps: int = 50,
    few_steps: Sequence[int] = (4, 2, 1),
    seeds: Sequence[int] = (0, 1, 2),
    progress: Callable[[int], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Measure how well teacher and student follow prompts of rendered shapes, with the same prompts and seeds.

    Each row has the number of `steps`, the rates of correct colour, direction and shape, their mean `following`,
    `spread` (of start positions relative to the data's, see `StartSpread`; the mean over directions and axes), and
    `samples`. Rows also have `following_kept` and `spread_kept`, their ratios to the teacher's at `reference_steps`.

    Args:
      teacher: sampled with its own sampler and guidance.
      student: sampled with its own.
      reference_steps: number of steps of the teacher that all rows are compared with.
      few_steps: further numbers of steps, of teacher and student.
      seeds: seeds of the samples; each has all prompts (see `make_shape_requests`).
      progress: called with the number of finished rows.
    """
    table: dict[str, dict[str, Any]] = {}
    for name, pipeline, steps in (
        *(("teacher", teacher, steps) for steps in (reference_steps, *few_steps)),
        *(("student", student, steps) for steps in few_steps),
    ):
        table[f"{name}, {steps} steps"] = {"steps": steps, **_measure(pipeline, steps, seeds)}
        if progress is not None:
            progress(len(table))
    reference = table[f"teacher, {reference_steps} steps"]
    for row in table.values():
        for figure in ("following", "spread"):
            value, best = row[figure], reference[figure]
            row[f"{figure}_kept"] = None if value is None or not best else value / best
    return table


def _measure(pipeline: Pipeline, steps: int, seeds: Sequence[int]) -> dict[str, Any]:
    collection = MetricCollection((PromptFollowing(), StartSpread()))
    for seed in seeds:
        requests = make_shape_requests(seed)
        prompts = [request.prompt for request in requests]
        collection.update(MetricBatch(samples=pipeline.generate_many(requests, steps=steps), prompts=prompts))
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
