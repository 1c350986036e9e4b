"""Evaluate the generation tasks of a model of rendered scenes, and write its samples and figures."""

from dit_video.core.platform.scripts import prepare_script

prepare_script(__name__)

import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import tyro

import dit_video
from dit_video.core.command_line import check_minimum, parse_arguments
from dit_video.core.errors import UserError, script
from dit_video.core.files import write_json
from dit_video.core.platform.compilation_cache import enable_compilation_cache
from dit_video.evaluation.collection import MetricCollection
from dit_video.evaluation.evaluate import print_results
from dit_video.evaluation.metrics.metric import MetricBatch
from dit_video.sampling.pipeline import Pipeline
from dit_video.sampling.tasks import DescribedEdit, Edit
from dit_video.scenes.tasks import TASK_MEASURES, TaskCase, TaskMeasure, make_cases
from dit_video.video import Clip, decode

EDIT_METHODS = ("sdedit", "flow_edit", "inversion")
_FLOW_EDIT_DRAWS = 4
"""Number of noises in every step of FlowEdit."""
_BATCH = 32


def main(
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    out: Path,
    tasks: tuple[str, ...] = tuple(TASK_MEASURES),
    count: int = 60,
    levels: tuple[int, ...] = (1, 2),
    seed: int = 1000,
    resample: int = 1,
    cache: bool = True,
) -> None:
    """Evaluate the generation tasks of a model of rendered scenes, and write its samples and figures.

    Every task is measured as the model was trained for it and, where that is possible, without training, from the
    written files. For example:

        python experiments/evaluate_tasks.py runs/scenes/tasks --out runs/scenes/tasks/evaluation
        python experiments/evaluate_tasks.py RUN --out OUT --tasks inpainting editing --count 20 --levels 3

    Args:
        run: Folder of a run or a pipeline.
        out: Folder of the results: TASK/METHOD/ with the clips, and TASK.json with the figures.
        tasks: Names of the tasks.
        count: Number of scenes of each task.
        levels: Levels of the scenes.
        seed: Seed of the scenes and samples, another one than the training's.
        resample: Number of times that every block of steps is taken where known pixels are kept without training.
        cache: Keep compiled programs in ~/.cache/dit_video/programs.
    """
    check_minimum(1, count=count, resample=resample)
    if unknown := sorted(set(tasks) - TASK_MEASURES.keys()):
        raise UserError(f"tasks={unknown[0]} is unknown; use {', '.join(TASK_MEASURES)}")
    if cache:
        enable_compilation_cache()
    pipeline = dit_video.load(run)
    for name in tasks:
        start = time.perf_counter()
        task = TASK_MEASURES[name]
        cases = list(make_cases(task, pipeline.reconstruct, count=count, seed=seed, levels=levels))
        figures = {}
        for method in list_methods(name, task):
            clips = sample(pipeline, cases, method, seed, out / name / method, resample=resample)
            collection = MetricCollection(task.metrics)
            collection.update(
                MetricBatch(
                    samples=clips, prompts=[clip.caption for clip in clips], scenes=[each.truth for each in cases]
                )
            )
            results = collection.compute()
            print(f"{name}, {method}:")
            print_results(results, is_precise=True)
            figures[method] = {key: vars(each.estimate) for key, each in results.items()}
        seconds = round(time.perf_counter() - start, 1)
        settings = {"count": count, "levels": levels, "seed": seed, "resample": resample, "seconds": seconds}
        write_json(out / f"{name}.json", settings | figures)


def list_methods(name: str, task: TaskMeasure) -> tuple[str, ...]:
    """Return the ways in which a task is measured."""
    if name == "editing":
        return EDIT_METHODS
    return ("auto", "training_free") if task.is_completed else ("auto",)


def sample(
    pipeline: Pipeline, cases: list[TaskCase], method: str, seed: int, folder: Path, *, resample: int = 1
) -> list[Clip]:
    """Sample all cases into files, and return what is decoded of them."""
    folder.mkdir(parents=True, exist_ok=True)
    seeds = [seed + number for number in range(len(cases))]
    clips: list[Clip] = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="this model was not trained")
        if method in EDIT_METHODS:
            clips = [edit(pipeline, case, method, each) for case, each in zip(cases, seeds, strict=True)]
        else:
            options: dict[str, Any] = {} if method == "auto" else {"method": method, "resample": resample}
            for start in range(0, len(cases), _BATCH):
                part = slice(start, start + _BATCH)
                clips += pipeline.run([case.task for case in cases[part]], seed=seeds[part], **options)
    decoded = []
    for number, clip in enumerate(clips):
        path = folder / f"{number:03d}.{'png' if len(clip.frames) == 1 else 'apng'}"
        clip.save(path)
        decoded.append(replace(decode(path), caption=clip.caption))
    return decoded


def edit(pipeline: Pipeline, case: TaskCase, method: str, seed: int) -> Clip:
    """Return the edited clip of a case."""
    task = case.task
    assert isinstance(task, Edit)
    assert task.prompt is not None
    if method == "sdedit":
        return pipeline.run(task, seed=seed)
    described: dict[str, Any] = {"source": task.clip.caption, "edit_method": method}
    draws = _FLOW_EDIT_DRAWS if method == "flow_edit" else 1
    return pipeline.run(DescribedEdit(task.clip, task.prompt, **described, draws=draws), seed=seed)


if __name__ == "__main__":
    script(parse_arguments)(main)
