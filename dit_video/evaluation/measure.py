"""A protocol's metrics of a set of clips, and their record: what was measured, left out, or not computable."""

from collections.abc import Callable, Collection, Mapping, Sequence
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
from dit_video.evaluation.protocol import Protocol
from dit_video.sampling.pipeline import Pipeline

METRICS_FILE = "metrics.json"
WEIGHT_FIELDS = ("weights", "mean", "folder")
"""Names of the fields in feature functions and metrics that hold weight paths."""
_EXAMPLE_NEEDS = PROMPT_NEEDS | CLIP_NEEDS
"""Needs of metrics whose examples are the samples."""
_REAL_NEEDS = frozenset[MetricInput](("real_clips",))
"""Needs of metrics whose examples are the data clips."""
_INPUTS = {
    "samples": "samples. Name a model, or a folder of videos",
    "real_clips": "clips of the data. Name them with --data",
    "prompts": "prompts. Give each clip a caption",
    "pairs": "the clips that were reconstructed. Name them with --data",
    "scenes": "the scenes that the samples show. Use the protocol scenes with a model of them",
    "pipeline": "the model itself. Name it instead of a folder of samples",
}
"""Inputs that an evaluation may lack, and how to give them."""


class Measurement(NamedTuple):
    """Results of the metrics, and what they were computed on."""

    results: dict[str, MetricResult]
    """Results by name."""
    skipped: dict[str, str]
    """Reason for each metric that was not computed, by the name of its class."""
    examples: dict[str, dict[str, Any]]
    """Values of each sample, by its name."""
    record: dict[str, Any]
    """Content of `metrics.json`."""


def measure(
    samples: ClipSet,
    protocol: Protocol,
    folder: str | Path,
    *,
    real_clips: ClipSet | None = None,
    is_reconstruction: bool = False,
    truths: Sequence[Any] = (),
    pipeline: Pipeline | None = None,
    recorded: Mapping[str, Any] | None = None,
    model: Mapping[str, Any] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Measurement:
    """Compute a protocol's metrics of a set of clips, and write `metrics.json`.

    A metric whose weights or inputs are missing is left out with the reason, and the others are computed. In a run of
    several processes all of them call this with a folder that they share, and each reads a part of the clips.

    Args:
      samples: Clips of a model; none if only the model itself is measured, on data clips.
      protocol: What is measured.
      folder: Folder of `metrics.json`.
      real_clips: Data clips, if any.
      is_reconstruction: True if each sample is a reconstruction of the data clip with its name.
      truths: True content of each sample, if the prompts describe rendered scenes.
      pipeline: The model, for metrics that measure its denoiser.
      recorded: Further fields of the recorded protocol: how the samples were made.
      model: Description of the model, recorded next to the protocol.
      progress: Called with the number of clips that were read.

    Raises:
      UserError: If no metric can be computed, too many clips cannot be read, or reconstructions have other originals or
        none.
    """
    if is_reconstruction and real_clips is None:
        raise UserError(f"the protocol {protocol.name} compares clips with their originals. Name these with --data")
    present: dict[MetricInput, object] = {
        "samples": samples.names,
        "prompts": samples.names and all(samples.captions),
        "scenes": truths,
        "real_clips": real_clips,
        "pairs": is_reconstruction,
        "pipeline": pipeline,
    }
    inputs = {name for name, value in present.items() if value}
    metrics, skipped, weights = _open_metrics(protocol, inputs)
    updates = ClipUpdates(MetricCollection(metrics), protocol, pipeline, progress)
    error = None
    try:
        if is_reconstruction:
            updates.add_samples(samples, originals=real_clips)
        else:
            if real_clips is not None and any("real_clips" in metric.needs for metric in metrics):
                updates.add_real_clips(real_clips)
            updates.add_samples(samples, truths=truths)
    except UserError as raised:
        error = raised
    updates.merge_processes(error)
    if real_clips is not None and real_clips.rejected:  # even if no metric reads them: their captions are missing
        updates.excluded.setdefault(real_clips.location, {}).update(real_clips.rejected)
    results = updates.collection.compute()
    config = _drop_paths(config_json.to_json(protocol))
    record = {
        "metrics": config.pop("metrics"),
        "protocol": {"config": config, "data": updates.data_digest, "weights": weights, **(recorded or {})},
        "model": dict(model or {}),
        "samples": len(updates.names),
        "real_clips": len(updates.real_names),
        "results": list_results(results),
        "skipped": skipped,
        "excluded": updates.excluded,
        "examples": updates.collection.list_examples(updates.names, _EXAMPLE_NEEDS),
        "clips": updates.collection.list_examples(
            updates.names if is_reconstruction else updates.real_names, _REAL_NEEDS
        ),
        "nearest": updates.list_nearest(),
    }
    if is_first_process():
        write_json(Path(folder) / METRICS_FILE, record)
    return Measurement(results, skipped, record["examples"], record)


def count_clips(protocol: Protocol, *, samples: int, real_clips: int) -> int:
    """Return the number of clips that `measure` reads from so many samples or reconstructions, and data clips."""
    needs = {need for metric in protocol.metrics for need in metric.needs}
    reads_real_clips = "real_clips" in needs and "pairs" not in needs
    return samples * ("samples" in needs or "pairs" in needs) + real_clips * reads_real_clips


def check_computable(protocol: Protocol, inputs: Collection[MetricInput]) -> None:
    """Check that at least one metric of a protocol can be computed, before samples are made for it.

    Args:
      protocol: The protocol.
      inputs: Data that the metrics will get.

    Raises:
      UserError: If none can; the message gives the reason for each.
    """
    _open_metrics(protocol, inputs)


def _open_metrics(
    protocol: Protocol, inputs: Collection[MetricInput]
) -> tuple[list[Metric], dict[str, str], dict[str, list[str]]]:
    """Return the metrics that can be computed, the reasons for the others, and the weights of each by name.

    Raises:
      UserError: If none can be computed; the message gives the reason for each.
    """
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
    if not opened:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
        raise UserError(f"no metric of the protocol {protocol.name} can be computed: {reasons}")
    return opened, skipped, identities


def _drop_paths(value: Any) -> Any:
    """Return a config without weight paths; the weights' hashes are recorded instead."""
    if isinstance(value, dict):
        return {name: _drop_paths(item) for name, item in value.items() if name not in WEIGHT_FIELDS}
    return [_drop_paths(item) for item in value] if isinstance(value, list) else value
