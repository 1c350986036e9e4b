"""Metrics of a set of clips by a protocol, and their record: what was measured, left out, and could not be computed."""

import hashlib
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from dit_video.core import config_json
from dit_video.core.errors import DecodeError, MissingError, UserError
from dit_video.core.files import write_json
from dit_video.evaluation.clip_set import ClipSet, hash_clip
from dit_video.evaluation.collection import MetricCollection, MetricResult, list_results
from dit_video.evaluation.metrics.metric import (
    CLIP_NEEDS,
    PROMPT_NEEDS,
    ClipReconstruction,
    Metric,
    MetricBatch,
    MetricInput,
)
from dit_video.evaluation.protocol import Protocol
from dit_video.pipelines.pipeline import Pipeline
from dit_video.video import Clip

METRICS_FILE = "metrics.json"
WEIGHT_FIELDS = ("weights", "mean", "folder")
"""Names of fields of feature functions and metrics that hold paths of weights."""
_BATCH = 16
"""Number of clips in memory at once."""
_EXAMPLE_NEEDS = PROMPT_NEEDS | CLIP_NEEDS | frozenset[MetricInput](("real_clips",))
"""Needs of metrics whose examples are the samples."""
_MAX_NAMED = 5
_INPUTS = {
    "samples": "samples. Name a model, or a folder of videos",
    "real_clips": "clips of the data. Name them with --data",
    "prompts": "prompts. Give each clip a caption",
    "pairs": "the clips that were reconstructed. Name them with --data",
    "scenes": "the scenes that the samples show. Use the protocol scenes with a model of them",
    "pipeline": "the model itself. Name it instead of a folder of samples",
}
"""Inputs that an evaluation may lack, and how to give them."""


@dataclass
class ClipReader:
    """Clips of a set as a protocol samples them; those that cannot be read are counted and named."""

    clips: ClipSet
    protocol: Protocol
    numbers: Sequence[int]
    """Numbers of the clips to read."""
    excluded: dict[str, str] = field(default_factory=dict)
    """Reason for each clip that is left out, by name."""

    def read(self, number: int) -> Clip | None:
        """Return a clip, or None if it is left out.

        Raises:
          UserError: more clips are left out than the protocol allows.
        """
        name, sampling = self.clips.names[number], self.protocol.clips
        try:
            return sampling.sample(self.clips.read(number, sampling.fps), seed=self.protocol.seed, number=number)
        except (DecodeError, UserError, OSError) as error:
            self.excluded[name] = str(error)
        if len(self.excluded) > self.protocol.max_unreadable * len(self.numbers):
            named = "; ".join(f"{each}: {reason}" for each, reason in list(self.excluded.items())[:_MAX_NAMED])
            raise UserError(
                f"{len(self.excluded)} of {len(self.numbers)} clips of {self.clips.location} cannot be measured, more "
                f"than max_unreadable={self.protocol.max_unreadable:g}: {named}. Mend or remove them"
            )
        return None

    def __iter__(self) -> Iterator[tuple[int, Clip]]:
        """Yield the numbers and the clips that can be read."""
        for number in self.numbers:
            if (clip := self.read(number)) is not None:
                yield number, clip


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
    progress: Callable[[int], None] | None = None,
) -> Measurement:
    """Compute a protocol's metrics of a set of clips, and write `metrics.json`.

    A metric whose weights or inputs are missing is left out with the reason, and the others are computed.

    Args:
      samples: clips of a model; none where only the model itself is measured, on clips of the data.
      protocol: what is measured.
      folder: folder of `metrics.json`.
      real_clips: clips of the data, if any.
      is_reconstruction: each sample is a reconstruction of the clip of the data with its name.
      truths: true content of each sample, where prompts are of rendered scenes.
      pipeline: the model, for metrics of its denoiser.
      recorded: further fields of the recorded protocol: how the samples were made.
      progress: called with the number of clips that were read.

    Raises:
      UserError: no metric can be computed, too many clips cannot be read, or reconstructions of other clips.
    """
    present: dict[MetricInput, object] = {
        "samples": samples.names,
        "prompts": samples.names and all(samples.captions),
        "scenes": truths,
        "real_clips": real_clips,
        "pairs": is_reconstruction,
        "pipeline": pipeline,
    }
    inputs = {name for name, value in present.items() if value}
    metrics, skipped, weights = _open_metrics(protocol.metrics, inputs)
    if not metrics:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
        raise UserError(f"no metric of the protocol {protocol.name} can be computed: {reasons}")
    updates = _Updates(MetricCollection(metrics), protocol, pipeline, progress)
    if is_reconstruction:
        assert real_clips is not None  # reconstructions are of clips of the data
        updates.add_samples(samples, originals=real_clips)
    else:
        if real_clips is not None and any("real_clips" in metric.needs for metric in metrics):
            updates.add_real_clips(real_clips)
        updates.add_samples(samples, truths=truths)
    results = updates.collection.compute()
    config = _drop_paths(config_json.to_json(protocol))
    record = {
        "metrics": config.pop("metrics"),
        "protocol": {"config": config, "data": updates.data_digest, "weights": weights, **(recorded or {})},
        "samples": len(updates.names),
        "results": list_results(results),
        "skipped": skipped,
        "excluded": updates.excluded,
        "examples": updates.collection.list_examples(updates.names, _EXAMPLE_NEEDS),
        "nearest": updates.list_nearest(),
    }
    write_json(Path(folder) / METRICS_FILE, record)
    return Measurement(results, skipped, record["examples"], record)


class _Updates:
    """Metrics that get clips in batches, and what they got."""

    def __init__(
        self,
        collection: MetricCollection,
        protocol: Protocol,
        pipeline: Pipeline | None,
        progress: Callable[[int], None] | None,
    ):
        self.collection, self._protocol, self._pipeline, self._progress = collection, protocol, pipeline, progress
        self.names: list[str] = []
        """Names of the samples that were measured."""
        self.excluded: dict[str, dict[str, str]] = {}
        """Reasons for the clips that are left out, by set and name."""
        self._real_names: list[str] = []
        self._hashes: list[str] = []
        self._count = 0

    @property
    def data_digest(self) -> str | None:
        """Return a hash of the pixels of all clips of the data, in their order; None without any."""
        return hashlib.sha256("".join(self._hashes).encode()).hexdigest()[:16] if self._hashes else None

    def list_nearest(self) -> dict[str, str]:
        """Return the name of the nearest clip of the data of each sample; empty if no metric knows them."""
        numbers = self.collection.list_nearest()
        if len(numbers) != len(self.names):
            return {}  # there are none, or they are of frames
        return {name: self._real_names[number] for name, number in zip(self.names, numbers, strict=True)}

    def add_real_clips(self, clips: ClipSet) -> None:
        """Read clips of the data."""
        protocol = self._protocol
        numbers = protocol.choose(len(clips.names), protocol.real_count, purpose="measured clips of the data")
        for part in self._read(clips, numbers):
            real_clips = [clip for _, clip in part]
            self._real_names += [clips.names[number] for number, _ in part]
            self._hashes += map(hash_clip, real_clips)
            self.collection.update(MetricBatch(real_clips=real_clips, pipeline=self._pipeline))

    def add_samples(self, clips: ClipSet, *, truths: Sequence[Any] = (), originals: ClipSet | None = None) -> None:
        """Read samples, of rendered scenes with their truths, of reconstructions with the originals."""
        protocol = self._protocol
        pairs = None if originals is None else _PairReader(originals, clips, protocol)
        for part in self._read(clips, protocol.choose(len(clips.names), protocol.count, purpose="measured samples")):
            made = [] if pairs is None else [pairs.make_pair(number, clip) for number, clip in part]
            self._hashes += [hash_clip(pair.original) for pair in made]
            batch = MetricBatch(
                samples=[clip for _, clip in part],
                prompts=[clip.caption for _, clip in part],
                scenes=[truths[number] for number, _ in part] if truths else (),
                pairs=made,
                real_clips=[pair.original for pair in made],
                pipeline=self._pipeline,
            )
            self.collection.update(batch)
            self.names += [clips.names[number] for number, _ in part]

    def _read(self, clips: ClipSet, numbers: Sequence[int]) -> Iterator[list[tuple[int, Clip]]]:
        """Yield batches of clips with their numbers."""
        reader = ClipReader(clips, self._protocol, numbers)
        iterator = iter(reader)
        while part := list(itertools.islice(iterator, _BATCH)):
            yield part
            self._count += len(part)
            if self._progress is not None:
                self._progress(self._count)
        if reader.excluded:
            self.excluded[clips.location] = reader.excluded


class _PairReader:
    """Original clips of reconstructions, by their names without suffix."""

    def __init__(self, originals: ClipSet, samples: ClipSet, protocol: Protocol):
        self._originals, self._samples, self._protocol = originals, samples, protocol
        self._numbers = {Path(name).with_suffix("").as_posix(): number for number, name in enumerate(originals.names)}
        lacking = [name for name in samples.names if Path(name).with_suffix("").as_posix() not in self._numbers]
        if lacking:
            named = ", ".join(lacking[:_MAX_NAMED])
            raise UserError(
                f"{len(lacking)} of {len(samples.names)} reconstructions have no original of their name in "
                f"{originals.location}, such as {named}. Name the folder of the originals"
            )

    def make_pair(self, number: int, decoded: Clip) -> ClipReconstruction:
        """Return a reconstruction with its original, whose first frames are compared if it is longer."""
        name = self._samples.names[number]
        original = ClipReader(self._originals, self._protocol, (0,)).read(
            self._numbers[Path(name).with_suffix("").as_posix()]
        )
        assert original is not None  # with one number, a clip that cannot be read is an error
        return ClipReconstruction(name, original, decoded)


def _open_metrics(
    metrics: Sequence[Metric], inputs: Collection[MetricInput]
) -> tuple[list[Metric], dict[str, str], dict[str, list[str]]]:
    """Return the metrics that can be computed, the reasons for the others, and the weights of each by name."""
    opened, skipped, identities = [], {}, {}
    for metric in metrics:
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
    """Return a config without the paths of weights, whose hashes are recorded instead."""
    if isinstance(value, dict):
        return {name: _drop_paths(item) for name, item in value.items() if name not in WEIGHT_FIELDS}
    return [_drop_paths(item) for item in value] if isinstance(value, list) else value
