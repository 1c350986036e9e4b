"""Which examples an epoch has, where that is not each one once: several data sets by weight, one of several variants.

A source is drawn without replacement: it is gone through in an order of its own until it is used up, then in another.
An epoch takes the next stretch of every source's order, so a source may last for several epochs, or come several times
in one. All of it is a function of (seed, epoch).
"""

import functools
import hashlib
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from dit_video.core import rng
from dit_video.core.errors import UserError

_GOLDEN = (math.sqrt(5) - 1) / 2
_SPREAD = 0.2
"""By how much the sizes are perturbed that order a source, so that its passes differ in more than where they start."""


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """How much of each source an epoch has.

    Clips are numbered over all sources, those of the first source first.

    Raises:
      UserError: an empty source, weights that are not positive, a share that is too small or variants of other clips.
    """

    sizes: tuple[int, ...]
    """clips of each source"""
    weights: tuple[float | int, ...] | None = None
    """of each source, relative to each other; None weighs all clips the same"""
    by: Literal["examples", "tokens"] = "examples"
    """Whether the weights are shares of the clips of an epoch, or of its video tokens (of the work, and of a loss that
    averages over tokens)."""
    length: int | None = None
    """clips of an epoch; None for as many as there are"""
    variants: tuple[tuple[int, ...], ...] | None = None
    """Of every clip, the examples (captions, resolutions, stretches) of which it is one at a time: each once before one
    comes again, in random order. None: every clip is one example."""

    def __post_init__(self):
        if not self.sizes or min(self.sizes) < 1:
            raise UserError(f"a mixture needs sources with at least one clip each, sizes={self.sizes}")
        if self.weights is not None and (
            len(self.weights) != len(self.sizes) or not all(0 < weight < math.inf for weight in self.weights)
        ):
            raise UserError(
                f"a mixture needs one positive weight a source: {len(self.sizes)} sources, weights={self.weights}; "
                "leave a source out that is not wanted"
            )
        if self.by not in ("examples", "tokens"):
            raise UserError(f"weights are shares of examples or of tokens, not by={self.by!r}")
        if self.length is not None and self.length < 1:
            raise UserError(f"length={self.length}: an epoch has at least one clip")
        if self.variants is not None:
            self._check_variants(self.variants)

    @property
    def clips(self) -> int:
        """Of all sources."""
        return sum(self.sizes)

    def _check_variants(self, variants: tuple[tuple[int, ...], ...]) -> None:
        if len(variants) != self.clips:
            raise UserError(f"{len(variants)} groups of variants were given for {self.clips} clips; give one a clip")
        if not all(variants):
            raise UserError(f"clip {next(i for i, group in enumerate(variants) if not group)} has no variant")
        examples = np.sort(np.concatenate([np.asarray(group, np.int64) for group in variants]))
        if not np.array_equal(examples, np.arange(len(examples))):
            raise UserError("every example must be a variant of exactly one clip, and be numbered from 0 on")


class Draws:
    """The examples of every epoch.

    Args:
      mixture: how much of each source.
      tokens: video tokens of every example.
      seed: of the run.

    Raises:
      UserError: sizes that disagree.
    """

    def __init__(self, mixture: Mixture, tokens: Int[np.ndarray, " n"], *, seed: int):
        groups = mixture.variants
        number = mixture.clips if groups is None else sum(map(len, groups))
        if number != len(tokens):
            raise UserError(f"the mixture has {number} examples, the index has {len(tokens)}; make both of one list")
        self.mixture = mixture
        self._tokens, self._seed = tokens, seed
        if groups is not None:
            self._examples = np.concatenate([np.asarray(group, np.int64) for group in groups])
            self._counts = np.asarray([len(group) for group in groups])
            self._starts = np.cumsum([0, *self._counts[:-1]])
        self._bounds = np.cumsum([0, *mixture.sizes])
        self._rates = self._rate()
        self.least: int = sum(map(math.floor, self._rates))
        """Every epoch has at least as many examples."""
        if self.least < 1:
            raise UserError(f"some epochs of {sum(self._rates):g} clips would have none; raise length")

    def start(self, epoch: int) -> int:
        """How many examples are drawn before this epoch."""
        return sum(self._position(source, epoch) for source in range(len(self._rates)))

    def epoch(self, number: int) -> Int[np.ndarray, " n"]:
        """The examples of one epoch, source after source; one may come several times."""
        return np.concatenate([self._stretch(source, number) for source in range(len(self._rates))])

    def shares(self, examples: Int[np.ndarray, " m"]) -> tuple[Float[np.ndarray, " s"], Float[np.ndarray, " s"]]:
        """The share of each source in these examples: by number, and by video tokens."""
        if self.mixture.variants is None:
            clips = examples
        else:
            clip_of = np.empty(len(self._examples), np.int64)
            clip_of[self._examples] = np.repeat(np.arange(len(self._counts)), self._counts)
            clips = clip_of[examples]
        sources, count = np.searchsorted(self._bounds, clips, side="right") - 1, len(self.mixture.sizes)
        number = np.bincount(sources, minlength=count)
        tokens = np.bincount(sources, weights=self._tokens[examples], minlength=count)
        return number / number.sum(), tokens / tokens.sum()

    @functools.cached_property
    def hash(self) -> str:
        """Equal for mixtures that draw the same, for equal sizes and seeds."""
        constants = (self.mixture, _GOLDEN, _SPREAD)
        return hashlib.sha256(repr(constants).encode()).hexdigest()[:16]

    def _rate(self) -> list[float]:
        """Clips of each source an epoch; a fraction comes as one more every few epochs."""
        mixture = self.mixture
        weights = np.asarray(mixture.sizes if mixture.weights is None else mixture.weights, np.float64)
        if mixture.by == "tokens" and mixture.weights is not None:
            sizes = self._tokens.astype(np.float64)
            if mixture.variants is not None:
                sizes = np.add.reduceat(sizes[self._examples], self._starts) / self._counts
            weights = weights / (np.add.reduceat(sizes, self._bounds[:-1]) / np.asarray(mixture.sizes))
        return (weights / weights.sum() * (mixture.length or mixture.clips)).tolist()

    def _position(self, source: int, epoch: int) -> int:
        # The rate may be off by a rounding: a source that comes whole must do so in every epoch.
        exact = epoch * self._rates[source]
        return math.floor(exact * (1 + 1e-12) + 1e-9)

    def _stretch(self, source: int, epoch: int) -> np.ndarray:
        size = self.mixture.sizes[source]
        first, last = self._position(source, epoch), self._position(source, epoch + 1)
        parts = [np.zeros(0, np.int64)]
        while first < last:
            number, offset = divmod(first, size)
            stop = min(size, offset + last - first)
            parts.append(self._pass(source, number)[offset:stop])
            first += stop - offset
        return np.concatenate(parts)

    def _pass(self, source: int, number: int) -> np.ndarray:
        """All clips of a source in an order of which every stretch has nearly the same sizes.

        Clips by size (perturbed) are visited in the golden ratio's steps, modulo 1 (a sequence of low discrepancy), so
        that epochs that hold a part of the source need the same number of rows.
        """
        generator = rng.host(self._seed, "mixture", source, number)
        examples = self._variant(source, number)
        size = len(examples)
        sizes = self._tokens[examples] * generator.uniform(1 - _SPREAD, 1 + _SPREAD, size)
        steps = np.mod(np.arange(size) * _GOLDEN + generator.random(), 1)
        order = np.empty(size, np.int64)
        order[np.argsort(steps, kind="stable")] = np.argsort(sizes, kind="stable")
        return examples[order]

    def _variant(self, source: int, number: int) -> np.ndarray:
        """The example that stands for each clip of a source in one pass over it."""
        clips = np.arange(self._bounds[source], self._bounds[source + 1])
        if self.mixture.variants is None:
            return clips
        counts, chosen = self._counts[clips], np.empty(len(clips), np.int64)
        for count in np.unique(counts).tolist():
            among = np.flatnonzero(counts == count)
            cycle, index = divmod(number, count)
            generator = rng.host(self._seed, "variants", source, count, cycle)
            chosen[among] = np.argsort(generator.random((len(among), count)), axis=1)[:, index]
        return self._examples[self._starts[clips] + chosen]
