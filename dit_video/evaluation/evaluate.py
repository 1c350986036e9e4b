"""Evaluation of a model by a protocol: samples that are made once, reconstructions, and their metrics."""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from dit_video.core import config_json
from dit_video.core.errors import UserError
from dit_video.data.clips import ClipSource
from dit_video.data.latents.codec import LatentCodec, compute_autoencoder_identity
from dit_video.distributed.faults.progress import count_progress
from dit_video.distributed.gather import is_first_process
from dit_video.evaluation.clip_set import NO_CLIPS, ClipSet
from dit_video.evaluation.collection import MetricResult
from dit_video.evaluation.measure import EvaluationResult, check_computable, list_inputs, measure
from dit_video.evaluation.metrics.metric import CLIP_NEEDS
from dit_video.evaluation.protocol import EvaluationData, EvaluationItem, EvaluationProtocol
from dit_video.evaluation.samples import SampleFolder
from dit_video.sampling import Sampling
from dit_video.sampling.clip_recipe import describe_config
from dit_video.sampling.pipeline import Pipeline
from dit_video.sampling.pipeline_config import PipelineConfig
from dit_video.sampling.preparation import EmptyCodec, check_requests
from dit_video.sampling.request import Request
from dit_video.sampling.tasks.task_file import get_entry_prompt, make_request
from dit_video.tokens import Grid
from dit_video.training.hooks.logging import Progress
from dit_video.video import Clip

SAMPLES_FOLDER = "samples"


def evaluate(
    pipeline: Pipeline,
    protocol: EvaluationProtocol,
    folder: str | Path,
    *,
    data: EvaluationData | None = None,
    sampling: Sampling | None = None,
    average: Mapping[str, float | None] | None = None,
    replace_samples: bool = False,
    share: Callable[[], AbstractContextManager[None]] | None = None,
) -> EvaluationResult:
    """Sample and reconstruct as a protocol says, compute its metrics, and write `samples/` and `metrics.json`.

    The samples depend on the protocol's items, never on its metrics. Existing samples are not made again, so that a
    killed evaluation goes on and further metrics use the same samples. In a run of several processes all of them call
    this: they sample together, and each decodes and measures a part.

    Args:
      pipeline: The model.
      protocol: What is sampled and measured.
      folder: Folder of the results.
      data: Data clips, perhaps with those of the training; not needed for a protocol that renders its own.
      sampling: Steps, solver and guidance; the pipeline's own by default.
      average: Average of a run's weights that the pipeline has, as passed to `dit_video.load`; it is part of the
        recorded protocol. None for the model's own weights.
      replace_samples: Whether samples that other weights or settings made are replaced; otherwise they are refused.
      share: Returns a context in which each process has the files that the first one has written to `folder`; needed if
        the processes have folders of their own.

    Raises:
      UserError: If there are no data, clips have no captions, the folder holds samples of other settings or other
        files, or `measure` raises it.
    """
    opened = _open(pipeline, protocol, Path(folder), data, sampling, replace_samples=replace_samples, share=share)
    samples, seconds = NO_CLIPS, None
    if opened.samples is not None:
        missing, start_time = len(opened.samples.list_missing()), time.perf_counter()
        with Progress("sampling", len(opened.samples), unit="clip", visible=is_first_process()) as progress:
            samples = opened.samples.fill(progress.update)
        if missing == len(opened.samples):
            seconds = round(time.perf_counter() - start_time, 3)
    return _measure(opened, samples, average=average)._replace(seconds=seconds)


def evaluate_in_background(
    pipeline: Pipeline,
    protocol: EvaluationProtocol,
    folder: str | Path,
    executor: Executor,
    *,
    data: EvaluationData | None = None,
) -> Future[EvaluationResult] | None:
    """Sample as a protocol says, and let a thread of the first process decode, write and measure.

    Meanwhile the weights of the denoiser may change: metrics that need the model itself, or reconstructions, are left
    out. In a run of several processes all of them call this, and the others get None.

    Args:
      pipeline: The model.
      protocol: What is sampled and measured.
      folder: Folder of the results.
      executor: Executor of the thread.
      data: Data clips, perhaps with those of the training.

    Raises:
      UserError: If the protocol does not fit the model, or the folder holds other files than samples.
    """
    opened = _open(pipeline, protocol, Path(folder), data, None, replace_samples=True, share=nullcontext, is_alone=True)
    writes = [] if opened.samples is None else list(opened.samples.start())

    def finish() -> EvaluationResult:
        for write in writes:
            write()
        samples = NO_CLIPS if opened.samples is None else opened.samples.finish()
        return _measure(opened, samples, is_alone=True)

    return executor.submit(finish) if is_first_process() else None


class _Plan(NamedTuple):
    """The samples, reconstructions and data that a protocol measures, with the sampling that makes them."""

    protocol: EvaluationProtocol
    """Protocol, completed by what the model determines."""
    data: EvaluationData
    items: tuple[EvaluationItem, ...]
    sampling: Sampling
    reconstructions: ClipSet | None
    """Reconstructions of the data, made when they are read; None if no metric needs them."""


class _OpenEvaluation(NamedTuple):
    """A plan that is ready to be sampled and measured."""

    pipeline: Pipeline
    plan: _Plan
    folder: Path
    samples: SampleFolder | None
    """Folder of the samples; None if nothing is sampled."""
    model: dict[str, Any]
    """Description of the weights, which a training changes later."""


def _open(
    pipeline: Pipeline,
    protocol: EvaluationProtocol,
    folder: Path,
    data: EvaluationData | None,
    sampling: Sampling | None,
    *,
    replace_samples: bool,
    share: Callable[[], AbstractContextManager[None]] | None,
    is_alone: bool = False,
) -> _OpenEvaluation:
    plan = _make_plan(pipeline, protocol, data, sampling, is_alone=is_alone)
    samples = None
    if plan.items:
        samples = SampleFolder(
            folder / SAMPLES_FOLDER,
            pipeline,
            [item.entry for item in plan.items],
            sampling=plan.sampling,
            codec=protocol.codec,
            crf=protocol.crf,
            replace_others=replace_samples,
            share=share,
        )
    weights = pipeline.compute_digest() if samples is None else samples.weights
    described = {"weights": weights, "parameters": pipeline.count_parameters()}
    return _OpenEvaluation(pipeline, plan, folder, samples, described)


def _make_plan(
    pipeline: Pipeline,
    protocol: EvaluationProtocol,
    data: EvaluationData | None,
    sampling: Sampling | None,
    *,
    is_alone: bool = False,
) -> _Plan:
    """Return the plan of an evaluation, once it is known that the model can make and measure all of it."""
    sampling, data = pipeline.make_sampling(sampling), protocol.make_data(data)
    items, reconstructions = tuple(protocol.make_items(pipeline, data)), None
    requests = [make_request(item.entry, pipeline.config) for item in items]
    check_requests(pipeline.config, [request for request in requests if request is not None], sampling)
    _check_lengths(pipeline.config, protocol, items)
    needs_reconstructions = protocol.is_reconstruction or any(CLIP_NEEDS & {*each.needs} for each in protocol.metrics)
    if not is_alone and data.clips.names and needs_reconstructions:
        protocol, reconstructions = reconstruct(pipeline.codec, protocol, data.clips)
    if not is_alone:
        planned = _plan_samples(items, requests)
        if protocol.is_reconstruction and reconstructions is not None:
            planned = reconstructions
        real_clips = data.clips if data.clips.names else None
        check_computable(protocol, list_inputs(planned, real_clips, reconstructions, pipeline))
    return _Plan(protocol, data, items, sampling, reconstructions)


def _check_lengths(config: PipelineConfig, protocol: EvaluationProtocol, items: Sequence[EvaluationItem]) -> None:
    """Check that enough samples of requests will have the frames that are measured.

    A task makes clips of its own lengths, and at another frame rate each clip has another number of frames.

    Raises:
      UserError: If more samples are too short than the protocol allows.
    """
    measured = protocol.clips.frames
    if measured is None or protocol.clips.fps not in (None, config.fps):
        return
    lengths = [config.resolve_size(item.entry).t for item in items if isinstance(item.entry, Request)]
    short = [length for length in lengths if length < measured]
    if len(short) > protocol.max_unreadable * len(items):
        raise UserError(
            f"frames={measured} of the protocol {protocol.name} is invalid: {len(short)} of {len(items)} samples have "
            f"fewer. Use {min(short)}, or longer samples"
        )


class _EmptyPipeline(Pipeline):
    """A pipeline without weights, whose reconstructions are the clips themselves."""

    def __init__(self, config: PipelineConfig):
        self.config, self.codec = config, EmptyCodec(config.model.autoencoder, {})


def check_evaluation(config: PipelineConfig, protocol: EvaluationProtocol, data: EvaluationData | None = None) -> None:
    """Check that a pipeline of a config can be sampled and measured as a protocol says, before its weights are there.

    Raises:
      UserError: If `evaluate` would refuse the protocol, the data or the sampling of the config.
    """
    _make_plan(_EmptyPipeline(config), protocol, data, None)


def _plan_samples(items: Sequence[EvaluationItem], requests: Sequence[Request | None]) -> ClipSet:
    """Return the set of the samples before they are made: prompts, references and true contents.

    The samples are named by their prompts.
    """
    prompts = tuple(get_entry_prompt(item.entry, request) for item, request in zip(items, requests, strict=True))
    return _add_references(NO_CLIPS._replace(names=prompts, captions=prompts), items)


def _add_references(samples: ClipSet, items: Sequence[EvaluationItem]) -> ClipSet:
    """Return samples with the references and the true contents of their items, if each item has one."""
    references = [item.read_reference for item in items if item.read_reference is not None]
    truths = [item.truth for item in items if item.truth is not None]
    return samples._replace(
        references=references if len(references) == len(items) else (),
        truths=truths if len(truths) == len(items) else (),
    )


def _measure(
    opened: _OpenEvaluation,
    samples: ClipSet,
    *,
    average: Mapping[str, float | None] | None = None,
    is_alone: bool = False,
) -> EvaluationResult:
    pipeline, (protocol, data, items, sampling, reconstructions) = opened.pipeline, opened.plan
    model = pipeline.config.model
    recorded: dict[str, Any] = {"average": dict(average or {})}
    if items:
        recorded["sampling"] = describe_config(sampling)
    elif protocol.is_reconstruction:
        recorded["autoencoder"] = config_json.to_json(model.autoencoder)
    elif reconstructions is None:
        recorded["autoencoder"] = compute_autoencoder_identity(model.autoencoder, pipeline.codec.params)
        recorded["objective"] = [config_json.to_json(model.process), config_json.to_json(model.prediction)]
    if protocol.is_reconstruction and reconstructions is not None:
        samples = reconstructions
    result = measure(
        _add_references(samples, items),
        protocol,
        opened.folder,
        real_clips=data.clips if data.clips.names else None,
        reconstructions=reconstructions,
        make_baseline=_open_baseline(data, protocol, model.autoencoder.stride),
        pipeline=None if is_alone else pipeline,
        recorded=recorded,
        model=opened.model,
        is_alone=is_alone,
    )
    return result._replace(items=items, sampling=sampling if items else None)


def evaluate_autoencoder(
    codec: LatentCodec, protocol: EvaluationProtocol, folder: str | Path, *, data: EvaluationData
) -> EvaluationResult:
    """Reconstruct the data's clips, compute the metrics of a protocol that need no more, and write `metrics.json`.

    Raises:
      UserError: If no metric can be computed of reconstructions.
    """
    protocol, reconstructions = reconstruct(codec, protocol, data.clips)
    return measure(
        NO_CLIPS,
        protocol,
        folder,
        real_clips=data.clips,
        reconstructions=reconstructions,
        make_baseline=_open_baseline(data, protocol, codec.config.stride),
        model={"parameters": {"autoencoder": codec.count_parameters()}},
    )


def reconstruct(codec: LatentCodec, protocol: EvaluationProtocol, clips: ClipSet) -> tuple[EvaluationProtocol, ClipSet]:
    """Return the protocol with the autoencoder's size steps, and the reconstructions, made when they are read."""
    adapted = replace(protocol, clips=replace(protocol.clips, multiple=codec.config.stride))

    def read(index: int, fps: float | None) -> Clip:
        original = adapted.clips.sample(clips.read(index, fps), seed=adapted.seed, number=index)
        count_progress()
        return codec.reconstruct(original)

    return adapted, clips._replace(location=f"reconstructions of {clips.location}", read=read)


def _open_baseline(data: EvaluationData, protocol: EvaluationProtocol, stride: Grid) -> Callable[[Clip], Clip] | None:
    """Return the function that reconstructs a clip by the linear autoencoder, if there is one and a metric needs it."""
    needs_baseline = any("baselines" in metric.needs for metric in protocol.metrics)
    if not needs_baseline or (linear := data.linear()) is None:
        return None
    return lambda clip: replace(clip, frames=linear.reconstruct_clip(clip.frames, stride))


def check_held_out(clips: ClipSource) -> None:
    """Check that there are held-out clips to reconstruct.

    Raises:
      UserError: If there are none.
    """
    if not len(clips):
        raise UserError("no clips are held out to be reconstructed; name some with --data.held-out")


def print_results(results: Mapping[str, MetricResult], *, is_precise: bool = False) -> None:
    """Print the headline values with their intervals."""
    for _, description, estimate in results.values():
        if description.is_headline and estimate.value is not None:
            interval = description.format_interval(estimate, is_precise=is_precise)
            details = ", ".join(filter(None, (interval, f"{estimate.count} examples")))
            print(f"{description.label}: {description.format_value(estimate.value, is_precise=is_precise)} ({details})")
