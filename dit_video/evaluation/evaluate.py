"""Evaluation of a pipeline: samples in files and reconstructions of held-out clips, and metrics of both."""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from dit_video.core import config_json
from dit_video.core.errors import UserError, check_at_least
from dit_video.core.files import write_json
from dit_video.data.clips import ClipSource
from dit_video.data.latents.codec import LatentCodec
from dit_video.data.sizes import SizeLimits, read_fitted_clip
from dit_video.diffusion import SOLVERS, TEXT, ExplicitTimes, Guidance
from dit_video.distributed.faults.progress import count_progress
from dit_video.distributed.gather import is_first_process
from dit_video.evaluation.collection import MetricCollection, MetricResult, list_results
from dit_video.evaluation.config import CaptionEvaluation, Evaluation
from dit_video.evaluation.metrics.metric import (
    CLIP_NEEDS,
    PROMPT_NEEDS,
    ClipReconstruction,
    Metric,
    MetricBatch,
    MetricInput,
)
from dit_video.evaluation.requests import EvaluationClips, EvaluationRequest
from dit_video.evaluation.samples import SavedSample, check_replaceable, read_samples, write_samples
from dit_video.models.autoencoders import LinearAutoencoder
from dit_video.sampling import Sampling
from dit_video.sampling.pipeline import Pipeline
from dit_video.training.hooks.logging import Progress
from dit_video.video import Clip

_CLIP_NEEDS = CLIP_NEEDS | frozenset[MetricInput](("real_clips",))
"""Needs of metrics whose examples are the held-out clips, which are also the data clips."""
_BATCH = 16
"""Number of examples that metrics get at once."""


class EvaluationResult(NamedTuple):
    """Results of an evaluation, with the clips that they were computed on."""

    metrics: dict[str, Any]
    """Content of `metrics.json`."""
    results: dict[str, MetricResult]
    """Results by name."""
    reconstructions: list[ClipReconstruction]
    samples: list[SavedSample]
    is_trained_caption: list[bool]
    """True for each sample whose caption belongs to a training clip."""


def evaluate(
    pipeline: Pipeline,
    folder: str | Path,
    *,
    seed: int,
    clips: EvaluationClips | None = None,
    evaluation: Evaluation | None = None,
    sampling: Sampling | None = None,
    share: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
) -> EvaluationResult:
    """Sample as the pipeline's config says, compute its metrics, and write `samples/` and `metrics.json`.

    The samples depend on the config's prompts and the seed, never on its metrics; if no clip has a caption to sample,
    there are none. In a run of several processes all of them call this and sample; the first one decodes, measures and
    writes. All of them compute metrics that need the pipeline.

    Args:
      pipeline: The pipeline to evaluate.
      folder: Folder of the results.
      seed: Seed of the samples.
      clips: Clips of the pipeline's training run; without them nothing is reconstructed.
      evaluation: Prompts and metrics; by default the ones that the pipeline's training run asked for.
      sampling: Steps, solver and guidance; the pipeline's own by default.
      share: Returns a context in which each process has the files that the first one has written to `folder`; needed if
        the processes have folders of their own.

    Raises:
      UserError: If there are neither clips nor prompts, the folder's `samples/` holds other files, the seed is
        negative, or the sampling is invalid.
    """
    folder = Path(folder)
    check_at_least(0, seed=seed)
    if is_first_process():
        check_replaceable(folder / "samples")
    sampling = pipeline.make_sampling(sampling)
    config = evaluation or pipeline.config.evaluation or CaptionEvaluation()
    frames = pipeline.config.model.frame_conditioning
    requests = config.make_requests(clips, seed, image=frames is not None and frames.prob == 1)
    if not requests and clips is None:
        raise UserError("there are no captions to sample; give clips captions, or sample prompts with sample.py")
    collection = MetricCollection(config.metrics)
    is_measuring = is_first_process() or "pipeline" in collection.needs
    reconstructions: list[ClipReconstruction] = []
    if clips is not None and is_measuring:
        reconstructions = _measure_reconstructions(collection, pipeline.codec, clips, pipeline)
    start_time = time.perf_counter()
    if requests:
        with Progress("sampling", len(requests), unit="clip", visible=is_first_process()) as progress:
            prompted = [each.request for each in requests]
            write_samples(pipeline, prompted, folder / "samples", sampling=sampling, progress=progress.update)
    if not is_measuring:
        return EvaluationResult({}, {}, [], [], [])
    seconds = round(time.perf_counter() - start_time, 1)
    with share() if "pipeline" in collection.needs else contextlib.nullcontext():
        samples = read_samples(folder / "samples") if requests else []
    _update_samples(collection, requests, [sample.clip for sample in samples], pipeline)
    metrics = {
        "protocol": _describe_protocol(config, sampling, seed),
        "parameters": pipeline.count_parameters(),
        "sampling": {"samples": len(requests), "seed": seed, **_describe_sampling(sampling), "seconds": seconds},
    }
    result = EvaluationResult(metrics, {}, reconstructions, samples, [each.is_trained_caption for each in requests])
    return _write_results(folder, collection, result)


def measure_samples(
    evaluation: Evaluation,
    requests: Sequence[EvaluationRequest],
    clips: Sequence[Clip],
    folder: str | Path,
    *,
    sampling: Sampling,
    seed: int = 0,
) -> dict[str, MetricResult]:
    """Compute metrics of in-memory samples that need neither the model nor reconstructions, and write them.

    Args:
      evaluation: Metrics.
      requests: Requests of the samples.
      clips: The samples.
      folder: Folder of `metrics.json`.
      sampling: How the samples were made.
      seed: Seed of the requests.
    """
    metrics = [metric for metric in evaluation.metrics if PROMPT_NEEDS.issuperset(metric.needs)]
    collection = MetricCollection(metrics)
    _update_samples(collection, requests, clips)
    content = {"protocol": _describe_protocol(evaluation, sampling, seed)}
    samples = [SavedSample({"file": f"{number:03d}"}, clip) for number, clip in enumerate(clips)]
    return _write_results(Path(folder), collection, EvaluationResult(content, {}, [], samples, [])).results


def _describe_protocol(evaluation: Evaluation, sampling: Sampling, seed: int) -> dict[str, Any]:
    """Return everything besides the model that the values depend on."""
    return {"config": config_json.to_json(evaluation), "sampling": config_json.to_json(sampling), "seed": seed}


def _update_samples(
    collection: MetricCollection,
    requests: Sequence[EvaluationRequest],
    clips: Sequence[Clip],
    pipeline: Pipeline | None = None,
) -> None:
    needs_references = "references" in collection.needs
    for start in range(0, len(clips), _BATCH):
        part = requests[start : start + _BATCH]
        batch = MetricBatch(
            samples=clips[start : start + _BATCH],
            prompts=[each.request.prompt for each in part],
            references=[each.read_reference() for each in part] if needs_references else (),
            scenes=[each.scene for each in part],
            pipeline=pipeline,
        )
        collection.update(batch)
        count_progress()


def _measure_reconstructions(
    collection: MetricCollection, codec: LatentCodec, clips: EvaluationClips, pipeline: Pipeline | None = None
) -> list[ClipReconstruction]:
    """Reconstruct the held-out clips, if any metric needs that, and update the metrics."""
    if not len(clips.held_out) or not collection.needs & _CLIP_NEEDS:
        return []
    linear = clips.linear() if "baselines" in collection.needs else None
    pairs = reconstruct(codec, clips.held_out, clips.limits, linear=linear)
    for start in range(0, len(pairs), _BATCH):
        part = pairs[start : start + _BATCH]
        baselines = [pair.baseline for pair in part if pair.baseline is not None]
        originals = [pair.original for pair in part]
        collection.update(MetricBatch(pairs=part, baselines=baselines, real_clips=originals, pipeline=pipeline))
        count_progress()
    return pairs


def _write_results(folder: Path, collection: MetricCollection, result: EvaluationResult) -> EvaluationResult:
    """Write `metrics.json`, and return the result with the metrics' values."""
    results = collection.compute()
    metrics = result.metrics | {
        "results": list_results(results),
        "clips": collection.list_examples([pair.name for pair in result.reconstructions], _CLIP_NEEDS),
        "samples": collection.list_examples([entry["file"] for entry, _ in result.samples], PROMPT_NEEDS),
    }
    if is_first_process():
        write_json(folder / "metrics.json", metrics)
    return result._replace(metrics=metrics, results=results)


def print_results(results: Mapping[str, MetricResult], *, is_precise: bool = False) -> None:
    """Print the headline values with their intervals."""
    for _, description, estimate in results.values():
        if description.is_headline and estimate.value is not None:
            interval = description.format_interval(estimate, is_precise=is_precise)
            details = ", ".join(filter(None, (interval, f"{estimate.count} examples")))
            print(f"{description.label}: {description.format_value(estimate.value, is_precise=is_precise)} ({details})")


def _describe_sampling(sampling: Sampling) -> dict[str, Any]:
    """Return steps, solver and the prompt's guidance scale; also a shift, explicit times and guidance options, if any.

    The solver has its name on the command line, or else its class name.
    """
    guidance, solver = sampling.guidance, sampling.solver
    named = next((name for name, each in SOLVERS.items() if each == solver), type(solver).__name__.lower())
    scale = guidance.scales.get(TEXT, 1.0)
    plain = guidance == Guidance(scales={TEXT: scale})
    options = {} if plain else {"guidance_options": config_json.to_json(guidance)}
    if sampling.shift is not None:
        options["shift"] = sampling.shift
    if isinstance(sampling.time_schedule, ExplicitTimes):
        options["times"] = list(sampling.time_schedule.times)
    return {"steps": sampling.steps, "guidance": scale, **options, "solver": named}


def evaluate_autoencoder(
    codec: LatentCodec, clips: EvaluationClips, folder: str | Path, *, metrics: Sequence[Metric]
) -> EvaluationResult:
    """Reconstruct an autoencoder's held-out clips, compute the metrics that need no more, and write them.

    Raises:
      UserError: If no clips are held out.
    """
    check_held_out(clips.held_out)
    collection = MetricCollection([metric for metric in metrics if CLIP_NEEDS.issuperset(metric.needs)])
    pairs = _measure_reconstructions(collection, codec, clips)
    parameters = {"parameters": {"autoencoder": codec.count_parameters()}}
    return _write_results(Path(folder), collection, EvaluationResult(parameters, {}, pairs, [], []))


def check_held_out(clips: ClipSource) -> None:
    """Check that there are held-out clips to reconstruct.

    Raises:
      UserError: If there are none.
    """
    if not len(clips):
        raise UserError("no clips are held out to be reconstructed; name some with --data.held-out")


def reconstruct(
    codec: LatentCodec, clips: ClipSource, limits: SizeLimits, *, linear: LinearAutoencoder | None = None
) -> list[ClipReconstruction]:
    """Encode and decode the start of every clip at its training size, also by a linear autoencoder if one is given."""
    results = []
    for index, info in enumerate(clips.infos):
        original = read_fitted_clip(clips, index, limits)
        baseline = None
        if linear is not None:
            baseline = replace(original, frames=linear.reconstruct_clip(original.frames, codec.config.stride))
        results.append(ClipReconstruction(info.name, original, codec.reconstruct(original), baseline))
        count_progress()
    return results
