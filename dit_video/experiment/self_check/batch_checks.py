"""Checks of batches: the rows against the examples they were made of, and their order."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from dit_video.core.errors import DecodeError
from dit_video.data.loader import DenoiserBatches, PackedBatches
from dit_video.data.packing.rows import RowEntry
from dit_video.data.sizes import fit_size
from dit_video.experiment.self_check.problems import Problem
from dit_video.experiment.self_check.subject import CheckedTraining
from dit_video.tokens import PackedBatch, PackedShape
from dit_video.weights.frozen_encoders import FrozenTextEncoder

_MAX_CORRELATION = 0.9
"""Correlation of the order of examples with that of the data set, from which they count as not shuffled."""
_MAX_ROWS = 16
"""Number of rows of a batch that are checked."""
_MIN_ROWS = 4
"""Smallest number of rows by which two epochs are compared."""
_MAX_EQUAL_ROWS = 0.8
"""Share of rows that two epochs have in common, from which they count as the same."""
_MIN_EXAMPLES = 12
"""Smallest number of examples whose order says something."""
_MAX_EXAMPLES = 1_000_000
"""Largest number of examples of which two epochs are planned at once."""


def check_rows(subject: CheckedTraining, rows: PackedBatch, entries: Sequence[Sequence[RowEntry]]) -> list[Problem]:
    """Check the arrays of a batch against the examples that the plan puts into its rows."""
    problems: list[Problem] = []
    for number, row_entries in enumerate(entries[:_MAX_ROWS]):
        row = _Row(subject, rows, number)
        problems += row.check(row_entries)
    return problems


def check_repeated_examples(entries: Sequence[Sequence[RowEntry]]) -> list[Problem]:
    """Check that the rows of a batch do not have an example of an epoch twice."""
    keys = [(entry.epoch, entry.example) for row_entries in entries for entry in row_entries]
    count = len(keys) - len(set(keys))
    return [Problem("order", f"a batch has {count} examples of one epoch more than once")] if count else []


class _Row:
    """One row of a batch, with checks of its segments."""

    def __init__(self, subject: CheckedTraining, rows: PackedBatch, number: int):
        self._subject, self._number = subject, number
        self._tokens, self._positions = rows.tokens[number], rows.positions[number]
        self._segments, self._valid = np.asarray(rows.segments[number]), rows.valid[number]
        self._text, self._text_segments = rows.text[number], np.asarray(rows.text_segments[number])
        self._ranks = rows.examples[number]

    def check(self, entries: Sequence[RowEntry]) -> list[Problem]:
        problems = []
        expected_segments = []
        for index, entry in enumerate(entries):
            places = np.flatnonzero(self._segments == index + 1)
            problems += self._check_segment(index, entry, places)
            expected_segments += [index + 1] * len(self._make_positions(entry.example))
        if isinstance(self._subject.experiment.denoiser.layout, PackedShape):
            padded = np.pad(expected_segments, (0, max(0, len(self._segments) - len(expected_segments))))
            if not np.array_equal(padded, self._segments):
                first = int(np.flatnonzero(padded != self._segments)[0])
                problems.append(self._make(f"token {first} is in segment {self._segments[first]}, not {padded[first]}"))
        if (extra := int(self._segments.max(initial=0))) > len(entries):
            problems.append(self._make(f"it has {extra} segments, but {len(entries)} clips"))
        return problems

    def _check_segment(self, index: int, entry: RowEntry, places: np.ndarray) -> list[Problem]:
        latents, name = self._subject.latents, self._get_name(entry.example)
        problems = []
        positions = self._make_positions(entry.example)
        if len(places) != len(positions):
            return [self._make(f"{name} has {len(places)} tokens, not {len(positions)}")]
        if int(self._ranks[index]) != entry.rank:
            problems.append(self._make(f"segment {index + 1} has the random numbers of another example"))
        if not np.allclose(self._positions[places], positions, rtol=1e-5, atol=1e-5):
            wrong = int(np.abs(self._positions[places] - positions).max(axis=0).argmax())
            actual = self._positions[places][:, wrong]
            problems.append(
                self._make(
                    f"the positions of {name} along {'thw'[wrong]} run from {actual.min():g} to {actual.max():g}, not "
                    f"from 0 to {positions[:, wrong].max():g}"
                )
            )
        try:
            values = None if latents is None else latents[entry.example]
        except DecodeError:
            return [self._make(f"{name} is damaged, but counts in the loss")] if self._valid[index] else problems
        if not self._valid[index]:
            return problems  # a clip or a caption is damaged
        if values is not None:
            expected = _cut_patches(values, self._subject.experiment.denoiser.backbone.patch)
            if not np.allclose(self._tokens[places], expected, atol=1e-5):
                problems.append(self._make(f"the tokens of {name} are not the patches of its latents"))
        elif not np.any(self._tokens[places]):
            problems.append(self._make(f"the tokens of {name} are all 0"))
        return problems + self._check_text(index, entry, name)

    def _check_text(self, index: int, entry: RowEntry, name: str) -> list[Problem]:
        """Check that the text is that of a caption of the clip, as the table of the clips has it."""
        places = np.flatnonzero(self._text_segments == index + 1)
        tokenize = self._subject.text
        if not len(places):
            return [Problem("captions", f"{name} has no text, not even that of an empty caption")]
        number = self._get_clip(entry.example)
        captions = self._subject.clips.infos[number].captions or ("",)
        if not isinstance(tokenize, FrozenTextEncoder):
            texts = [np.asarray(tokenize(caption)) for caption in captions]
        elif self._subject.latents is not None:  # `check_text_embeddings` compares them with the encoder
            own = self._subject.latents.all_captions[entry.example]
            if own and not set(own) <= set(captions):
                return [Problem("captions", f"{name} has the caption {own[0]!r}, its clip {captions[0]!r}")]
            texts = [self._subject.latents.read_text(entry.example, number) for number in range(len(own))]
        else:
            return []
        values = self._text[places]
        if any(each.shape == values.shape and np.allclose(values, each, atol=1e-5) for each in texts):
            return []
        return [Problem("captions", f"{name} has another text than its caption {captions[0]!r}")]

    def _get_clip(self, example: int) -> int:
        return self._subject.find_clip(example)

    def _get_name(self, example: int) -> str:
        latents = self._subject.latents
        return self._subject.clips.infos[example].name if latents is None else latents.names[example]

    def _make_positions(self, example: int) -> Float[np.ndarray, "n 3"]:
        """Return the positions of a clip's tokens: counts, or in time seconds at the rate of its frames."""
        experiment, latents = self._subject.experiment, self._subject.latents
        backbone, stride = experiment.denoiser.backbone, experiment.autoencoder.model.stride
        info = self._subject.clips.infos[self._get_clip(example)]
        if latents is None:
            size = fit_size(info, experiment.limits)
            sizes = 1 + (size.t - 1) // stride.t, size.h // stride.h, size.w // stride.w
        else:
            sizes = latents.get_size(example)
        counts = [size // patch for size, patch in zip(sizes, backbone.patch, strict=True)]
        t, h, w = np.indices(counts).reshape(3, -1).astype(np.float64)
        if backbone.time_coordinate != "tokens":
            rate = info.fps if experiment.limits.fps is None else min(info.fps, experiment.limits.fps)
            frames = stride.t * backbone.patch.t
            # The first token stands for one frame; others may count from the first of theirs.
            lead = (frames - 1) / frames if backbone.time_coordinate == "frame seconds" else 0.0
            t = np.maximum(t - lead, 0) * frames / rate
        return np.stack([t, h, w], axis=-1)

    def _make(self, message: str) -> Problem:
        return Problem("rows", f"row {self._number}: {message}")


def _cut_patches(latents: Float[np.ndarray, "t h w c"], patch: Sequence[int]) -> Float[np.ndarray, "n p"]:
    """Return the patches of latents, one after the other."""
    (t, h, w, _), (pt, ph, pw) = latents.shape, patch
    patches = [
        latents[i : i + pt, j : j + ph, k : k + pw].reshape(-1)
        for i in range(0, t, pt)
        for j in range(0, h, ph)
        for k in range(0, w, pw)
    ]
    return np.stack(patches)


def check_order(batches: DenoiserBatches) -> list[Problem]:
    """Check that an epoch has each example once, in a random order, and the next one other rows."""
    if not isinstance(batches, PackedBatches) or not _MIN_EXAMPLES <= (count := batches.num_examples) <= _MAX_EXAMPLES:
        return []
    problems, plans = [], [batches.get_plan(epoch) for epoch in (0, 1)]
    for epoch, plan in enumerate(plans):
        order = plan.order
        if abs(correlation := np.corrcoef(order, np.arange(len(order)))[0, 1]) > _MAX_CORRELATION:
            problems.append(f"epoch {epoch} is in the order of the data set (correlation {correlation:.2f})")
        used = len(np.unique(order))
        if not batches.has_mixture and used < len(order):
            problems.append(f"epoch {epoch} has {len(order) - used} examples more than once")
        if not batches.has_mixture and used + len(plan.dropped_examples) < count:
            problems.append(f"epoch {epoch} leaves out {count - used} of {count} examples")
    first, second = ({frozenset(row) for row in plan.rows if len(row) > 1} for plan in plans)
    if len(first) >= _MIN_ROWS and len(first & second) > _MAX_EQUAL_ROWS * len(first):
        problems.append(f"{len(first & second)} of {len(first)} rows with several examples are those of the next epoch")
    return [Problem("order", each) for each in problems]


def check_repetition(previous: PackedBatch, rows: PackedBatch, step: int) -> list[Problem]:
    """Check that a batch is not the one before, unless there are as few clips."""
    if np.array_equal(previous.examples, rows.examples) and np.array_equal(previous.tokens, rows.tokens):
        return [Problem("order", f"the batches of steps {step - 1} and {step} are the same")]
    return []
