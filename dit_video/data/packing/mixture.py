"""Choice of an epoch's examples from several data sets by weight, and from several variants of each clip.

Sources are sampled without replacement: a source is read in a random order until it is exhausted, then in another one.
An epoch continues where the epoch before stopped, so a source may last for several epochs, or be read several times in
one. Everything is a function of (seed, epoch).
"""

import functools
import hashlib
import math
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from dit_video.core import rng
from dit_video.core.errors import UserError, check_at_least
from dit_video.core.shared_array import SharesArrays

_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
_SIZE_JITTER = 0.2
"""Relative perturbation of the sizes by which a source is ordered, so that its passes differ in more than the start."""


@dataclass(frozen=True, kw_only=True)
class Mixture(SharesArrays):
    """Configuration of the share of each source in an epoch.

    Clips are numbered over all sources, those of the first source first.

    Raises:
      UserError: If a source is empty, a weight is not positive, the epoch is too short, or variants do not match the
        clips.
    """

    sizes: tuple[int, ...]
    """Number of clips of each source."""
    weights: tuple[float | int, ...] | None = None
    """Relative weight of each source; None gives all clips the same weight."""
    weight_unit: Literal["examples", "tokens"] = "examples"
    """Unit of the weights: shares of the clips of an epoch, or of its video tokens (that is, of the work, and of a loss
    that averages over tokens)."""
    length: int | None = None
    """Number of clips of an epoch; None for as many as there are."""
    variants: Int[np.ndarray, " n"] | None = field(default=None, compare=False)
    """Number of the clip that each example is a variant of (caption, resolution, temporal crop). Each pass over a
    source uses one variant of a clip: each once before one is repeated, in random order. None makes every clip one
    example."""

    def __post_init__(self):
        if not self.sizes or min(self.sizes) < 1:
            raise UserError(f"sizes={self.sizes} is invalid: a mixture needs sources with at least one clip each")
        weights = [1] * len(self.sizes) if self.weights is None else self.weights
        if len(weights) != len(self.sizes) or not all(0 < weight < math.inf for weight in weights):
            raise UserError(
                f"weights={self.weights} is invalid for {len(self.sizes)} sources: a mixture needs one positive weight "
                "per source. Remove sources that are not wanted."
            )
        if self.weight_unit not in ("examples", "tokens"):
            raise UserError(f"weight_unit={self.weight_unit!r} is invalid. Use 'examples' or 'tokens'.")
        check_at_least(1, length=self.length)
        if self.variants is not None:
            self._check_variants(self.variants)

    @property
    def num_clips(self) -> int:
        """Return the number of clips of all sources."""
        return sum(self.sizes)

    def _check_variants(self, variants: Int[np.ndarray, " n"]) -> None:
        if len(variants) and not 0 <= variants.min() <= variants.max() < self.num_clips:
            raise UserError(
                f"variants are invalid: they are of clips {variants.min()} to {variants.max()}, but the sources have "
                f"{self.num_clips} clips. Use numbers from 0 to {self.num_clips - 1}."
            )
        counts = np.bincount(variants, minlength=self.num_clips)
        if not counts.all():
            raise UserError(f"clip {np.argmin(counts)} has no variant")


class MixtureSampler(SharesArrays):
    """A sampler that draws the examples of every epoch.

    Args:
      mixture: Share of each source.
      tokens: Video tokens of every example.
      seed: Seed of the run.

    Raises:
      UserError: If the mixture has another number of examples, or some epochs would be empty.
    """

    def __init__(self, mixture: Mixture, tokens: Int[np.ndarray, " n"], *, seed: int):
        clips = np.arange(mixture.num_clips) if mixture.variants is None else mixture.variants
        self._examples = np.argsort(clips, kind="stable")
        number = len(clips)
        if number != len(tokens):
            raise UserError(
                f"the mixture has {number} examples, but the index has {len(tokens)}; make both from the same clips"
            )
        self.mixture = mixture
        self._tokens, self._seed = tokens, seed
        self._counts = np.bincount(clips)
        self._starts = np.cumsum(self._counts) - self._counts
        self._bounds = np.cumsum([0, *mixture.sizes])
        self._rates = self._compute_rates()
        self.min_examples: int = sum(map(math.floor, self._rates))
        """Minimum number of examples of an epoch."""
        if self.min_examples < 1:
            raise UserError(f"length={sum(self._rates):g} is invalid: some epochs would have no clip; raise length")

    def count_before(self, epoch: int) -> int:
        """Return the number of examples that are drawn before this epoch."""
        return sum(self._get_position(source, epoch) for source in range(len(self._rates)))

    def draw_epoch(self, number: int) -> Int[np.ndarray, " n"]:
        """Return the examples of one epoch, source after source; an example may occur several times."""
        return np.concatenate([self._draw_source(source, number) for source in range(len(self._rates))])

    def compute_shares(self, drawn: Int[np.ndarray, " m"]) -> tuple[Float[np.ndarray, " s"], Float[np.ndarray, " s"]]:
        """Return the share of each source in the drawn examples: by number, and by video tokens."""
        clips = np.empty(len(self._examples), np.int64)
        clips[self._examples] = np.repeat(np.arange(len(self._counts)), self._counts)
        sources, count = np.searchsorted(self._bounds, clips[drawn], side="right") - 1, len(self.mixture.sizes)
        number = np.bincount(sources, minlength=count)
        tokens = np.bincount(sources, weights=self._tokens[drawn], minlength=count)
        return number / number.sum(), tokens / tokens.sum()

    @functools.cached_property
    def hash(self) -> str:
        """Return a hash that is equal for mixtures that draw the same examples, given equal sizes and seeds."""
        constants = (replace(self.mixture, variants=None), _GOLDEN_RATIO, _SIZE_JITTER)
        content = hashlib.sha256(repr(constants).encode())
        if self.mixture.variants is not None:
            content.update(self.mixture.variants.astype("<i8").tobytes())
        return content.hexdigest()[:16]

    def _compute_rates(self) -> list[float]:
        """Return the clips of each source per epoch; a fraction means one more clip every few epochs."""
        mixture = self.mixture
        weights = np.asarray(mixture.sizes if mixture.weights is None else mixture.weights, np.float64)
        if mixture.weight_unit == "tokens" and mixture.weights is not None:
            sizes = np.add.reduceat(self._tokens[self._examples].astype(np.float64), self._starts) / self._counts
            weights = weights / (np.add.reduceat(sizes, self._bounds[:-1]) / np.asarray(mixture.sizes))
        return (weights / weights.sum() * (mixture.length or mixture.num_clips)).tolist()

    def _get_position(self, source: int, epoch: int) -> int:
        # Rates are subject to rounding, and a source that is read once per epoch must not lose a clip to `floor`.
        exact = epoch * self._rates[source]
        return math.floor(exact * (1 + 1e-12) + 1e-9)

    def _draw_source(self, source: int, epoch: int) -> np.ndarray:
        size = self.mixture.sizes[source]
        first, last = self._get_position(source, epoch), self._get_position(source, epoch + 1)
        parts = [np.zeros(0, np.int64)]
        while first < last:
            number, offset = divmod(first, size)
            stop = min(size, offset + last - first)
            parts.append(self._order_pass(source, number)[offset:stop])
            first += stop - offset
        return np.concatenate(parts)

    def _order_pass(self, source: int, number: int) -> np.ndarray:
        """Return all clips of a source in an order in which every slice has nearly the same distribution of sizes.

        The clips, sorted by (perturbed) size, are visited in steps of the golden ratio modulo 1, a low-discrepancy
        sequence. So epochs that hold a part of the source need about the same number of rows.
        """
        generator = rng.make_generator(self._seed, "mixture", source, number)
        examples = self._choose_variants(source, number)
        size = len(examples)
        sizes = self._tokens[examples] * generator.uniform(1 - _SIZE_JITTER, 1 + _SIZE_JITTER, size)
        steps = np.mod(np.arange(size) * _GOLDEN_RATIO + generator.random(), 1)
        order = np.empty(size, np.int64)
        order[np.argsort(steps, kind="stable")] = np.argsort(sizes, kind="stable")
        return examples[order]

    def _choose_variants(self, source: int, number: int) -> np.ndarray:
        """Return the example that represents each clip of a source in one pass over it."""
        # A pass uses one variant of each clip: column `index` of a random permutation of its variants, which is drawn
        # anew once all of them have been used. Clips with equally many variants are handled at once.
        clips = np.arange(self._bounds[source], self._bounds[source + 1])
        counts, chosen = self._counts[clips], np.empty(len(clips), np.int64)
        for count in np.unique(counts).tolist():
            same_count = np.flatnonzero(counts == count)
            cycle, index = divmod(number, count)
            generator = rng.make_generator(self._seed, "variants", source, count, cycle)
            chosen[same_count] = np.argsort(generator.random((len(same_count), count)), axis=1)[:, index]
        return self._examples[self._starts[clips] + chosen]
