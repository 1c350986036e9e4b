"""A protocol's metrics of a set of clips, and their record: what was measured, left out, or not computable."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dit_video.core import config_json
from dit_video.core.errors import MissingError, UserError
from dit_video.core.files import write_json
from dit_video.distributed.gather import is_first_process
from dit_video.evaluation.clip_set import ClipSet
from dit_video.evaluation.clip_updates import ClipUpdates
from dit_video.evaluation.collection import MetricCollection, MetricResult, list_results
from dit_video.evaluation.metrics.metric import CLIP_NEEDS, PROMPT_NEEDS, Metric, MetricInput
from dit_video.evaluation.protocol import EvaluationItem, EvaluationProtocol
from dit_video.sampling import Sampling
from dit_video.sampling.pipeline import Pipeline
from dit_video.training.hooks.logging import Progress
from dit_video.video import Clip

METRICS_FILE = "metrics.json"
WEIGHT_FIELDS = ("weights", "mean", "folder")
"""Names of the fields in feature functions and metrics that hold weight paths."""
_REAL_NEEDS = frozenset[MetricInput](("real_clips",))
"""Needs of metrics whose examples are the data clips."""
_TO_RECONSTRUCT = "clips to reconstruct. Hold some out of the training (data.held_out), or name them with --data"
_INPUTS = {
    "samples": "samples. Name a model, or a folder of videos",
    "real_clips": "clips of the data. Name them with --data",
    "prompts": "prompts. Give each clip a caption",
    "pairs": _TO_RECONSTRUCT,
    "baselines": _TO_RECONSTRUCT,
    "references": "clips of the data with the samples' captions. Name a model, and clips with captions",
    "scenes": "the scenes that the samples show. Use the protocol scenes with a model of them",
    "pipeline": "the model itself. Name it instead of a folder of samples",
}
"""Inputs that an evaluation may lack, and how to give them."""


class EvaluationResult(NamedTuple):
    """Results of the metrics of a protocol, and what they were computed on."""

    record: dict[str, Any]
    """Content of `metrics.json`."""
    results: dict[str, MetricResult]
    """Results by name."""
    skipped: dict[str, str]
    """Reason for each metric that was not computed, by the names of its values."""
    protocol: EvaluationProtocol
    """Protocol, completed by what the model determines."""
    samples: ClipSet
    """Samples, or the reconstructions that a protocol of these measures in their place."""
    real_clips: ClipSet | None = None
    """Clips of the data."""
    reconstructions: ClipSet | None = None
    """Reconstructions of the data by the autoencoder, if there are any."""
    items: tuple[EvaluationItem, ...] = ()
    """What was sampled; none for samples of a folder."""
    sampling: Sampling | None = None
    """How it was sampled; None if nothing was."""
    make_baseline: Callable[[Clip], Clip] | None = None
    """Function that reconstructs a clip by a linear autoencoder, if a metric needs it."""
    seconds: float | None = None
    """Duration of sampling; None if nothing is sampled, or if some samples existed before."""


def measure(
    samples: ClipSet,
    protocol: EvaluationProtocol,
    folder: str | Path,
    *,
    real_clips: ClipSet | None = None,
    reconstructions: ClipSet | None = None,
    make_baseline: Callable[[Clip], Clip] | None = None,
    pipeline: Pipeline | None = None,
    recorded: Mapping[str, Any] | None = None,
    model: Mapping[str, Any] | None = None,
    is_alone: bool = False,
) -> EvaluationResult:
    """Compute a protocol's metrics of a set of clips, and write `metrics.json`.

    A metric whose weights or inputs are missing is left out with the reason, and the others are computed. In a run of
    several processes all of them call this with a folder that they share, and each reads a part of the clips.

    Args:
      samples: Clips of a model, or reconstructions for a protocol of these; none if only the model itself, or
        `reconstructions`, are measured.
      protocol: What is measured.
      folder: Folder of `metrics.json`.
      real_clips: Data clips, if any.
      reconstructions: Reconstructions of the data clips with their names, which are measured besides the samples.
      make_baseline: Returns the reconstruction of a data clip by a linear autoencoder.
      pipeline: The model, for metrics that measure its denoiser.
      recorded: Further fields of the recorded protocol: how the samples were made.
      model: Description of the model, recorded next to the protocol.
      is_alone: Whether this process measures alone, beside a training, whose metrics may all be left out.

    Raises:
      UserError: If no metric can be computed, too many clips cannot be read, or reconstructions have other originals or
        none.
    """
    if protocol.is_reconstruction:
        reconstructions = samples
        if real_clips is None:
            raise UserError(f"the protocol {protocol.name} compares clips with their originals. Name these with --data")
    inputs = list_inputs(samples, real_clips, reconstructions, pipeline)
    metrics, skipped, weights = _open_metrics(protocol, inputs)
    if not metrics and not (is_alone or protocol.may_only_sample):
        raise _make_error(protocol, skipped)
    needs = {need for metric in metrics for need in metric.needs}
    total = len(samples.names)
    total += 0 if reconstructions in (None, samples) else len(reconstructions.names)
    with Progress("measuring", total, unit="clip", visible=is_first_process() and not is_alone) as progress:
        updates = ClipUpdates(MetricCollection(metrics), protocol, pipeline, progress.update, is_alone)
        error = None
        try:
            needs_reconstructions = protocol.is_reconstruction or needs & CLIP_NEEDS
            if reconstructions is not None and real_clips is not None and needs_reconstructions:
                updates.add_reconstructions(reconstructions, real_clips, make_baseline)
            elif real_clips is not None and "real_clips" in needs:
                updates.add_real_clips(real_clips)
            if not protocol.is_reconstruction:
                updates.add_samples(samples)
        except UserError as raised:
            error = raised
        updates.merge_processes(error)
    if real_clips is not None and real_clips.rejected:  # even if no metric reads them: their captions are missing
        updates.excluded.setdefault(real_clips.location, {}).update(real_clips.rejected)
    results = updates.collection.compute()
    config = _drop_paths(config_json.to_json(protocol))
    # Reconstructions that are the samples have their values among these.
    sample_needs, clip_needs = PROMPT_NEEDS, CLIP_NEEDS | _REAL_NEEDS
    if protocol.is_reconstruction:
        sample_needs, clip_needs = PROMPT_NEEDS | CLIP_NEEDS, _REAL_NEEDS
    record = {
        "metrics": config.pop("metrics"),
        "protocol": {"config": config, "data": updates.data_digest, "weights": weights, **(recorded or {})},
        "model": dict(model or {}),
        "samples": len(updates.names),
        "real_clips": len(updates.real_names),
        "results": list_results(results),
        "skipped": skipped,
        "excluded": updates.excluded,
        "examples": updates.collection.list_examples(updates.names, sample_needs),
        "clips": updates.collection.list_examples(
            updates.names if protocol.is_reconstruction else updates.real_names, clip_needs
        ),
        "nearest": updates.list_nearest(),
    }
    if is_first_process():
        write_json(Path(folder) / METRICS_FILE, record)
    result = EvaluationResult(record, results, skipped, protocol, samples, real_clips, reconstructions)
    return result._replace(make_baseline=make_baseline)


def list_inputs(
    samples: ClipSet, real_clips: ClipSet | None, reconstructions: ClipSet | None, pipeline: Pipeline | None
) -> set[MetricInput]:
    """Return the data that metrics get of these clips, whose samples need not exist yet."""
    present: dict[MetricInput, object] = {
        "samples": samples.names,
        "prompts": samples.names and all(samples.captions),
        "references": samples.references,
        "scenes": samples.truths,
        "real_clips": real_clips,
        "pairs": reconstructions,
        "baselines": reconstructions,
        "pipeline": pipeline,
    }
    return {name for name, value in present.items() if value}


def check_computable(protocol: EvaluationProtocol, inputs: Collection[MetricInput]) -> None:
    """Check that at least one metric of a protocol can be computed, before samples are made for it.

    Args:
      protocol: The protocol.
      inputs: Data that the metrics will get.

    Raises:
      UserError: If none can; the message gives the reason for each.
    """
    metrics, skipped, _ = _open_metrics(protocol, inputs)
    if not metrics and not protocol.may_only_sample:
        raise _make_error(protocol, skipped)


def _make_error(protocol: EvaluationProtocol, skipped: Mapping[str, str]) -> UserError:
    reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
    return UserError(f"no metric of the protocol {protocol.name} can be computed: {reasons}")


def _open_metrics(
    protocol: EvaluationProtocol, inputs: Collection[MetricInput]
) -> tuple[list[Metric], dict[str, str], dict[str, list[str]]]:
    """Return the metrics that can be computed, the reasons for the others, and the weights of each by name."""
    opened, skipped, identities = [], {}, {}
    for metric in protocol.metrics:
        name = ", ".join(metric.describe())
        if lacking := sorted(set(metric.needs).difference(inputs)):
            skipped[name] = f"it needs {_INPUTS.get(lacking[0], lacking[0])}"
            continue
        try:
            weights = metric.open_weights()
        except MissingError as error:
            skipped[name] = str(error)
            continue
        opened.append(metric)
        if weights:
            identities[name] = list(weights)
    return opened, skipped, identities


def _drop_paths(value: Any) -> Any:
    """Return a config without weight paths; the weights' hashes are recorded instead."""
    if isinstance(value, dict):
        return {name: _drop_paths(item) for name, item in value.items() if name not in WEIGHT_FIELDS}
    return [_drop_paths(item) for item in value] if isinstance(value, list) else value
