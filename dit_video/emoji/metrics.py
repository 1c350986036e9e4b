"""Metrics of samples of emoji: which real one a sample is nearest to, how it moves, how near it is to what was seen.

Each is about prompts whose truth is an `EmojiTruth`.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

from dit_video.core.resize import resize
from dit_video.data.clips import ClipSource
from dit_video.emoji.gallery import Gallery, Match
from dit_video.emoji.loops import find_period, measure_motion, measure_seam
from dit_video.evaluation.metrics.metric import MeanMetric, MetricBatch, MetricDescription, ShareMetric
from dit_video.video import Clip, decode

MAX_DEVIATION = 0.25
"""Largest deviation of a sample's motion, and of its period, from the real clip's, relative to it."""
MAX_SEAM = 1.2
"""Largest change where a loop begins again, relative to the median change between its frames."""


_MOTION_SIDE = 24
"""Height and width at which motion is compared, in pixels: so small that noise and blur make little difference."""


class EmojiSet:
    """All real emoji of a data set with the columns that `source.write_columns` adds.

    Args:
      clips: The clips, with the background of the samples.

    Raises:
      UserError: If the data set lacks these columns.
    """

    def __init__(self, clips: ClipSource):
        clips.check_columns(("base", "tone", "held_out"))
        self._clips = clips
        self.bases, self.tones, self.held_out = (clips.column(name) for name in ("base", "tone", "held_out"))

    def __len__(self) -> int:
        return len(self._clips)

    def read(self, number: int) -> Clip:
        """Return a clip at its stored size."""
        return decode(self._clips[number], background=self._clips.get_background(number))

    @functools.cached_property
    def gallery(self) -> Gallery:
        """Return all clips in the form in which the nearest one is found."""
        return Gallery([self.read(number).frames for number in range(len(self))])

    @functools.cached_property
    def untrained(self) -> tuple[int, ...]:
        """Return the numbers of the clips that are held out."""
        return tuple(number for number, kind in enumerate(self.held_out) if kind)


class EmojiTruth(NamedTuple):
    """The truth of a sample: the emoji that its prompt names."""

    emoji: EmojiSet
    number: int
    """Number of the clip in the set."""


def find_shown(clip: Clip, emoji: EmojiSet) -> Match:
    """Return the real emoji that a clip shows."""
    return emoji.gallery.find_nearest(clip.frames)


def find_seen(clip: Clip, emoji: EmojiSet) -> Match:
    """Return the nearest of the emoji that were trained on."""
    return emoji.gallery.find_nearest(clip.frames, exclude=emoji.untrained)


@dataclass(frozen=True, kw_only=True)
class EmojiNames(ShareMetric):
    """Share of samples whose nearest real emoji has the prompt's name, whatever its tone."""

    needs = ("samples", "scenes")
    name: ClassVar[str] = "emoji_names"
    description: ClassVar[MetricDescription] = MetricDescription(
        label="right name at the first guess",
        unit="%",
        decimals=1,
        is_higher_better=True,
        explanation="the nearest of all real emoji has the name, whatever its tone",
    )

    def measure(self, batch: MetricBatch) -> Sequence[bool]:
        """Return for every sample whether its name is right."""
        pairs = _find_shown(batch)
        return [_is_alike(truth, shown) or _has_base(truth, shown) for truth, shown in pairs]


@dataclass(frozen=True, kw_only=True)
class EmojiTones(ShareMetric):
    """Share of samples of prompts with a tone of skin whose nearest real emoji has it."""

    needs = ("samples", "scenes")
    name: ClassVar[str] = "emoji_tones"
    description: ClassVar[MetricDescription] = MetricDescription(
        label="right tone of skin", unit="%", decimals=1, is_higher_better=True
    )

    def measure(self, batch: MetricBatch) -> Sequence[bool | None]:
        """Return for every sample whether its tone is right, and None for prompts without one."""
        return [
            _has_tone(truth, shown) if truth.emoji.tones[truth.number] else None for truth, shown in _find_shown(batch)
        ]


@dataclass(frozen=True, kw_only=True)
class EmojiMatches(ShareMetric):
    """Share of samples whose nearest real emoji has the prompt's name and tone."""

    needs = ("samples", "scenes")
    name: ClassVar[str] = "emoji_matches"
    description: ClassVar[MetricDescription] = MetricDescription(
        label="right name and tone", unit="%", decimals=1, is_higher_better=True
    )

    def measure(self, batch: MetricBatch) -> Sequence[bool]:
        """Return for every sample whether both are right."""
        return [
            _is_alike(truth, shown) or (_has_base(truth, shown) and _has_tone(truth, shown))
            for truth, shown in _find_shown(batch)
        ]


@dataclass(frozen=True, kw_only=True)
class EmojiMotion(ShareMetric):
    """Share of samples of emoji that move which move as much as the real clip, and repeat after as many frames."""

    needs = ("samples", "references", "scenes")
    name: ClassVar[str] = "emoji_motion"
    description: ClassVar[MetricDescription] = MetricDescription(
        label="size and period of the motion",
        unit="%",
        decimals=1,
        is_higher_better=True,
        explanation="both within 25 % of the real clip's",
    )

    def measure(self, batch: MetricBatch) -> Sequence[bool | None]:
        """Return for every sample whether its motion is the real one's, and None for pictures."""
        return [
            _moves_alike(sample, reference) if len(reference.frames) > 1 else None
            for sample, reference in zip(batch.samples, batch.references, strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class EmojiSeams(ShareMetric):
    """Share of samples of emoji that move whose last frame is followed by their first one without a jump."""

    needs = ("samples", "scenes")
    name: ClassVar[str] = "emoji_seams"
    description: ClassVar[MetricDescription] = MetricDescription(
        label="loops without a jump",
        unit="%",
        decimals=1,
        is_higher_better=True,
        explanation="the change at the seam is at most 1.2 times the median of neighbouring frames",
    )

    def measure(self, batch: MetricBatch) -> Sequence[bool | None]:
        """Return for every sample whether it loops, and None for pictures."""
        return [measure_seam(clip.frames) <= MAX_SEAM if len(clip.frames) > 1 else None for clip in batch.samples]


@dataclass(frozen=True, kw_only=True)
class EmojiCopies(MeanMetric):
    """Mean distance of samples from the nearest emoji that was trained on: near 0 for copies."""

    needs = ("samples", "scenes")
    name: ClassVar[str] = "emoji_seen_distance"
    description: ClassVar[MetricDescription] = MetricDescription(
        label="distance from the nearest trained emoji",
        decimals=1,
        is_higher_better=None,
        explanation="root mean square of pixels, in levels of 255",
    )

    def measure(self, batch: MetricBatch) -> Sequence[float]:
        """Return the distance of every sample."""
        pairs = zip(batch.samples, batch.scenes, strict=True)
        return [batch.derive(find_seen, clip, truth.emoji).distance for clip, truth in pairs]


def _find_shown(batch: MetricBatch) -> list[tuple[EmojiTruth, int]]:
    """Return the truth of each sample, and the number of the real emoji that it shows."""
    pairs = zip(batch.samples, batch.scenes, strict=True)
    return [(truth, batch.derive(find_shown, clip, truth.emoji).number) for clip, truth in pairs]


def _is_alike(truth: EmojiTruth, shown: int) -> bool:
    """Return whether an emoji looks exactly like that of the prompt, as flags of several places do."""
    return truth.emoji.gallery.is_same(truth.number, shown)


def _has_base(truth: EmojiTruth, shown: int) -> bool:
    return truth.emoji.bases[truth.number] == truth.emoji.bases[shown]


def _has_tone(truth: EmojiTruth, shown: int) -> bool:
    return truth.emoji.tones[truth.number] == truth.emoji.tones[shown]


def _moves_alike(sample: Clip, reference: Clip) -> bool:
    frames = [resize(clip.frames, _MOTION_SIDE, _MOTION_SIDE) for clip in (sample, reference)]
    pairs = (map(function, frames) for function in (measure_motion, find_period))
    return all(bool(np.abs(found - real) <= MAX_DEVIATION * real) for found, real in pairs)
