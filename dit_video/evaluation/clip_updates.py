"""Clips of a set, which metrics get in batches and a run's processes share."""

import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np

from dit_video.core.errors import DecodeError, UserError
from dit_video.distributed.exchange import broadcast_values
from dit_video.evaluation.clip_set import ClipSet, hash_clip
from dit_video.evaluation.collection import MetricCollection
from dit_video.evaluation.metrics.metric import ClipReconstruction, MetricBatch
from dit_video.evaluation.protocol import EvaluationProtocol
from dit_video.sampling.pipeline import Pipeline
from dit_video.video import Clip

_BATCH = 16
"""Number of clips in memory at once."""
_MAX_NAMED, _MAX_TRIED = 5, 64
"""Number of clips that an error names, and number of further clips that are tried for it."""


@dataclass
class ClipReader:
    """Clips of a set as a protocol samples them; unreadable ones are counted and named."""

    clips: ClipSet
    protocol: EvaluationProtocol
    numbers: Sequence[int]
    """Numbers of the clips to read."""
    total: int
    """Number of clips that all processes read."""
    excluded: dict[str, str] = field(default_factory=dict)
    """Reason for each clip that is left out, by name."""

    def read(self, number: int) -> Clip | None:
        """Return a clip, or None if it is left out."""
        name, sampling = self.clips.names[number], self.protocol.clips
        try:
            return sampling.sample(self.clips.read(number, sampling.fps), seed=self.protocol.seed, number=number)
        except (DecodeError, UserError, OSError) as error:
            self.excluded[name] = str(error)
        return None

    def __iter__(self) -> Iterator[tuple[int, Clip]]:
        """Yield the numbers and the clips that can be read.

        Raises:
          UserError: If more clips are left out than the protocol allows.
        """
        self.check()
        for place, number in enumerate(self.numbers):
            if (clip := self.read(number)) is not None:
                yield number, clip
            else:
                self.check(self.numbers[place + 1 :])

    def check(self, others: Sequence[int] = ()) -> None:
        """Check that no more clips are left out than the protocol allows.

        Args:
          others: Numbers of clips that may be tried so that the error names more than one.

        Raises:
          UserError: If more clips are left out.
        """
        if len(self.excluded) > self.protocol.max_unreadable * self.total:
            for number in others[:_MAX_TRIED]:
                if len(self.excluded) < _MAX_NAMED:
                    self.read(number)
        check_excluded(self.excluded, self.protocol, self.clips.location, total=self.total)


def check_excluded(excluded: Mapping[str, str], protocol: EvaluationProtocol, location: str, *, total: int) -> None:
    """Check that no more clips are left out than a protocol allows.

    Args:
      excluded: Reason for each clip that is left out, by name.
      protocol: The protocol.
      location: Folder of the clips.
      total: Number of clips to read.

    Raises:
      UserError: If more clips are left out; the message names the first of them.
    """
    if len(excluded) > protocol.max_unreadable * total:
        named = "; ".join(f"{each}: {reason}" for each, reason in itertools.islice(excluded.items(), _MAX_NAMED))
        few = "at least " if len(excluded) >= _MAX_NAMED else ""  # the others may not have been read
        raise UserError(
            f"{few}{len(excluded)} of {total} clips of {location} cannot be measured, more than "
            f"max_unreadable={protocol.max_unreadable:g}: {named}. Mend or remove them"
        )


@dataclass
class ClipUpdates:
    """Metrics that get clips in batches, and a record of what they got.

    The processes of a run each read a part of every set, and `merge_processes` joins their states. If a metric calls
    the model itself, which is a computation of all processes, all of them read all clips instead.
    """

    collection: MetricCollection
    protocol: EvaluationProtocol
    pipeline: Pipeline | None = None
    """Model, for metrics that measure its denoiser."""
    progress: Callable[[int], None] | None = None
    """Called with the number of clips that were read."""
    is_alone: bool = False
    """Whether this process reads all clips, and others know nothing of it."""
    names: list[str] = field(default_factory=list)
    """Names of the samples that were measured."""
    real_names: list[str] = field(default_factory=list)
    """Names of the data clips that were read."""
    excluded: dict[str, dict[str, str]] = field(default_factory=dict)
    """Reasons for the clips that are left out, by set and name."""
    _hashes: list[str] = field(default_factory=list)
    _totals: dict[str, int] = field(default_factory=dict)
    """Number of clips to read from each set."""
    _count: int = 0

    @property
    def data_digest(self) -> str | None:
        """Return a hash of all data clips' pixels, in order; None without data clips."""
        return hashlib.sha256("".join(self._hashes).encode()).hexdigest()[:16] if self._hashes else None

    @property
    def is_shared(self) -> bool:
        """Return True if each process reads a part of the clips."""
        return jax.process_count() > 1 and not self.is_alone and "pipeline" not in self.collection.needs

    def list_nearest(self) -> dict[str, str]:
        """Return the name of each sample's nearest data clip; empty if no metric knows it."""
        numbers = self.collection.list_nearest()
        if len(numbers) != len(self.names):
            return {}  # no metric knows them
        return {name: self.real_names[number] for name, number in zip(self.names, numbers, strict=True)}

    def add_real_clips(self, clips: ClipSet) -> None:
        """Read data clips."""
        protocol = self.protocol
        numbers = protocol.choose(len(clips.names), protocol.real_count, purpose="measured clips of the data")
        for part in self._read(clips, numbers):
            real_clips = [clip for _, clip in part]
            self.real_names += [clips.names[number] for number, _ in part]
            self._hashes += map(hash_clip, real_clips)
            self.collection.update(MetricBatch(real_clips=real_clips, pipeline=self.pipeline))

    def add_samples(self, clips: ClipSet) -> None:
        """Read samples, with their references and truths if they have any."""
        protocol = self.protocol
        needs_references = "references" in self.collection.needs
        for part in self._read(clips, protocol.choose(len(clips.names), protocol.count, purpose="measured samples")):
            batch = MetricBatch(
                samples=[clip for _, clip in part],
                prompts=[clip.caption for _, clip in part],
                references=[clips.references[number]() for number, _ in part] if needs_references else (),
                scenes=[clips.truths[number] for number, _ in part] if clips.truths else (),
                pipeline=self.pipeline,
            )
            self.collection.update(batch)
            self.names += [clips.names[number] for number, _ in part]

    def add_reconstructions(
        self, clips: ClipSet, originals: ClipSet, make_baseline: Callable[[Clip], Clip] | None = None
    ) -> None:
        """Read reconstructions with the clips of the data of their names.

        Args:
          clips: The reconstructions; they are the samples of a protocol of reconstructions.
          originals: Clips of the data.
          make_baseline: Returns the reconstruction of an original by a linear autoencoder.
        """
        protocol, pairs = self.protocol, _PairReader(originals, clips, self.protocol)
        numbers = protocol.choose(len(clips.names), protocol.count, purpose="measured samples")
        for part in self._read(clips, numbers if protocol.is_reconstruction else range(len(clips.names))):
            made = [pair for number, clip in part if (pair := pairs.make_pair(number, clip, make_baseline)) is not None]
            samples = [pair.decoded for pair in made] if protocol.is_reconstruction else []
            self._hashes += [hash_clip(pair.original) for pair in made]
            batch = MetricBatch(
                samples=samples,
                prompts=[clip.caption for clip in samples],
                pairs=made,
                baselines=[pair.baseline for pair in made if pair.baseline is not None],
                real_clips=[pair.original for pair in made],
                pipeline=self.pipeline,
            )
            self.collection.update(batch)
            names = self.names if protocol.is_reconstruction else self.real_names
            names += [pair.name for pair in made]
        self._totals.setdefault(pairs.location, len(clips.names))  # also for clips that other processes leave out
        if pairs.excluded:
            self.excluded.setdefault(pairs.location, {}).update(pairs.excluded)

    def merge_processes(self, error: UserError | None = None) -> None:
        """Join, in every process, what all processes have read, in the order of the clips.

        Args:
          error: Error of this process, which ends reading in all processes.

        Raises:
          UserError: If a process has an error, or together they leave out more clips than the protocol allows.
        """
        if not self.is_shared:
            if error is not None:
                raise error
            return
        own = (error, self.collection.states, self.names, self.real_names, self._hashes, self.excluded)
        self.collection = MetricCollection(self.collection.metrics)
        self.names, self.real_names, self._hashes, self.excluded = [], [], [], {}
        errors = []
        for raised, states, names, real_names, hashes, excluded in broadcast_values(own):
            errors += [] if raised is None else [raised]
            self.collection.merge(states)
            self.names += names
            self.real_names += real_names
            self._hashes += hashes
            for location, reasons in excluded.items():
                self.excluded.setdefault(location, {}).update(reasons)
        if errors:
            raise errors[0]
        for location, reasons in self.excluded.items():
            check_excluded(reasons, self.protocol, location, total=self._totals[location])

    def _read(self, clips: ClipSet, numbers: Sequence[int]) -> Iterator[list[tuple[int, Clip]]]:
        """Yield batches of this process's clips with their numbers."""
        processes, process = (jax.process_count(), jax.process_index()) if self.is_shared else (1, 0)
        own = np.array_split(np.array(numbers, np.int64), processes)[process].tolist()
        total = self._totals[clips.location] = len(numbers) + len(clips.rejected)
        reader = ClipReader(clips, self.protocol, own, total, dict(clips.rejected))
        iterator = iter(reader)
        while part := list(itertools.islice(iterator, _BATCH)):
            yield part
            self._count += len(part) * processes
            if self.progress is not None:
                self.progress(self._count)
        if reader.excluded:
            self.excluded.setdefault(clips.location, {}).update(reader.excluded)


class _PairReader:
    """Original clips of reconstructions, by their names without suffix."""

    def __init__(self, originals: ClipSet, samples: ClipSet, protocol: EvaluationProtocol):
        self._reader, self._samples = ClipReader(originals, protocol, (), len(samples.names)), samples
        self._numbers = {Path(name).with_suffix("").as_posix(): number for number, name in enumerate(originals.names)}
        lacking = [name for name in samples.names if Path(name).with_suffix("").as_posix() not in self._numbers]
        if lacking:
            named = ", ".join(lacking[:_MAX_NAMED])
            raise UserError(
                f"{len(lacking)} of {len(samples.names)} reconstructions have no original of their name in "
                f"{originals.location}, such as {named}. Name the folder of the originals"
            )

    @property
    def excluded(self) -> Mapping[str, str]:
        """Return the reason for each original that is left out, by name."""
        return self._reader.excluded

    @property
    def location(self) -> str:
        """Return the folder of the originals."""
        return self._reader.clips.location

    def make_pair(
        self, number: int, decoded: Clip, make_baseline: Callable[[Clip], Clip] | None
    ) -> ClipReconstruction | None:
        """Return a reconstruction with its original, whose first frames are compared if it is longer.

        It is None, and the original is left out, if the original cannot be read or has another size.

        Raises:
          UserError: If more originals are left out than the protocol allows.
        """
        name = self._samples.names[number]
        index = self._numbers[Path(name).with_suffix("").as_posix()]
        original = self._reader.read(index)
        if original is not None and original.frames.shape != decoded.frames.shape:
            sizes = ["x".join(map(str, each.frames.shape[:3])) for each in (original, decoded)]
            self._reader.excluded[self._reader.clips.names[index]] = f"it has {sizes[0]} pixels, {name} {sizes[1]}"
            original = None
        if original is None:
            self._reader.check()
            return None
        baseline = None if make_baseline is None else make_baseline(original)
        return ClipReconstruction(name, original, decoded, baseline)
