"""Batches of one shape for training the autoencoder: random windows of clips, in time and space.

Windows are uint8, as they are decoded, so that no pixel can be NaN or out of range. A clip that cannot be decoded is
set aside by its name, and another one takes its place.
"""

import hashlib
import os
import threading
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import grain
import numpy as np
from jaxtyping import UInt8

from dit_video.core import rng
from dit_video.core.errors import DecodeError, UserError
from dit_video.data.augmentation import Augmentation, changed, composite
from dit_video.data.clips import ClipSource
from dit_video.data.packing.rows import set_aside
from dit_video.data.prefetch import ENDLESS
from dit_video.data.sizes import SizeLimits, fit, read_fitted, sampled_frames
from dit_video.tokens import Grid

CACHE_BYTES = 2 << 30
_ATTEMPTS = 8
"""Clips that are tried, one after the other, instead of one that turns out to be damaged."""
THREADS = min(8, os.cpu_count() or 1)
"""That decode: as PyAV gives up Python's lock while it does, they run side by side."""


@dataclass(frozen=True, kw_only=True)
class WindowConfig:
    """What the autoencoder is trained on.

    Raises:
      UserError: a size or batch below 1.
    """

    size: Grid
    """frames, height and width of a window, in pixels"""
    batch: int
    """windows a step"""
    augment: Augmentation | None = None
    """how windows are changed at random; None for not at all"""

    def __post_init__(self):
        if self.augment is not None and self.augment.turned and self.size.h != self.size.w:
            raise UserError(
                f"windows of {tuple(self.size)} are not square, so that they can't be turned; set turned=False"
            )
        if min(self.size) < 1 or self.batch < 1:
            raise UserError(f"windows of {tuple(self.size)} in batches of {self.batch}: each must be at least 1")


class Stretches:
    """Clips at their training size, by stretches of their training length. What was decoded stays, as far as it fits.

    What comes later is decoded at every use: as every clip comes once an epoch, throwing out the oldest would throw out
    what is needed again first. Several threads may read.

    Args:
      source: the clips.
      limits: what they are resized to.
      cache_bytes: memory for decoded clips.
    """

    def __init__(self, source: ClipSource, limits: SizeLimits, *, cache_bytes: int = CACHE_BYTES):
        self.source, self.limits, self._room = source, limits, cache_bytes
        fitted = {index: _fit_or_none(source, index, limits) for index in range(len(source))}
        self.sizes: dict[int, Grid] = {index: size for index, size in fitted.items() if size is not None}
        """Of the clips that have a training size."""
        self._cache: dict[tuple[int, int], np.ndarray] = {}
        self._lock = threading.Lock()

    def count(self, clip: int) -> int:
        """How many stretches a clip has; the last one overlaps the one before it."""
        return -(-sampled_frames(self.source.infos[clip], self.limits) // self.sizes[clip].t)

    def frames(self, clip: int, stretch: int) -> UInt8[np.ndarray, "T H W 3"]:
        """One stretch."""
        frames = self._cache.get((clip, stretch))
        if frames is None:
            length = self.sizes[clip].t
            start = min(stretch * length, sampled_frames(self.source.infos[clip], self.limits) - length)
            frames = read_fitted(self.source, clip, self.limits, start=start).frames
            with self._lock:
                if frames.nbytes <= self._room and (clip, stretch) not in self._cache:
                    self._room -= frames.nbytes
                    self._cache[clip, stretch] = frames
        return frames


class Windows:
    """Batches of one shape by number; each is a function of (clips, limits, seed, number) alone.

    Every clip is seen once an epoch, in an order of its own; an epoch's end falls anywhere in a batch, so that a data
    set smaller than a batch fills it too. Of a clip's stretches one is drawn; the window lies anywhere in it.

    Args:
      stretches: the clips.
      config: size and number of the windows.
      seed: of the run.
      host: this host's number; its part of a batch is given.
      hosts: how many there are.

    Raises:
      UserError: no clip has room for a window, or hosts that do not divide the batch.
    """

    def __init__(self, stretches: Stretches, config: WindowConfig, *, seed: int, host: int = 0, hosts: int = 1):
        if config.batch % hosts:
            raise UserError(f"windows in batches of {config.batch} are not divisible by {hosts} hosts; use a multiple")
        self._share, self._host = config.batch // hosts, host
        self._stretches, self._config, self._seed = stretches, config, seed
        self.clips: tuple[int, ...] = tuple(
            index
            for index, size in stretches.sizes.items()
            if all(have >= want for have, want in zip(size, config.size, strict=True))
        )
        """The clips that are used."""
        infos = stretches.source.infos
        self.left_out: tuple[str, ...] = tuple(
            infos[index].name for index in sorted(set(range(len(infos))) - set(self.clips))
        )
        """Names of the clips that are smaller or shorter than a window at their training size."""
        if not self.clips:
            size = "{}x{}x{}".format(*config.size)
            raise UserError(
                f"none of the {len(infos)} clips has a window of {size} at its training size "
                f"({_largest(stretches.sizes.values())}); use a smaller window, or raise max_pixels or max_frames"
            )
        self._order: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))

    def __getitem__(self, number: int) -> UInt8[np.ndarray, "B T H W 3"]:
        first = number * self._config.batch + self._host * self._share
        return np.stack([self._window(first + index) for index in range(self._share)])

    def _window(self, position: int) -> UInt8[np.ndarray, "T H W 3"]:
        generator = rng.host(self._seed, "windows", position)
        window = self._cut([self._clip_at(position + attempt) for attempt in range(_ATTEMPTS)], generator)
        augment = self._config.augment
        if augment is None or not augment.composites or generator.random() >= augment.composites:
            return window
        others = [self.clips[index] for index in generator.integers(len(self.clips), size=_ATTEMPTS)]
        return composite(window, self._cut(others, generator), generator)

    def _cut(self, clips: Sequence[int], generator: np.random.Generator) -> UInt8[np.ndarray, "T H W 3"]:
        """A window of the first of these clips that can be decoded."""
        frames, size, augment = self._stretch(clips, generator), self._config.size, self._config.augment
        most = 1 if augment is None else min(2, frames.shape[1] // size.h, frames.shape[2] // size.w)
        zoom = int(generator.integers(most)) + 1
        size = Grid(size.t, zoom * size.h, zoom * size.w)
        t, h, w = (int(generator.integers(have - want + 1)) for have, want in zip(frames.shape[:3], size, strict=True))
        window = frames[t : t + size.t, h : h + size.h, w : w + size.w]
        return window if augment is None else changed(window, zoom, augment.turned, generator)

    def _stretch(self, clips: Sequence[int], generator: np.random.Generator) -> UInt8[np.ndarray, "T H W 3"]:
        """A stretch of the first of these clips that can be decoded; the others before it are set aside."""
        for clip in clips:
            try:
                return self._stretches.frames(clip, int(generator.integers(self._stretches.count(clip))))
            except DecodeError as error:
                set_aside(self._stretches.source.infos[clip].name, error)
        raise UserError(f"{len(clips)} clips in a row can't be decoded; ingest the clips again")

    def _clip_at(self, position: int) -> int:
        epoch, index = divmod(position, len(self.clips))
        order = self._order  # read once: another thread may be in another epoch
        if order[0] != epoch:
            order = (epoch, rng.host(self._seed, "window order", epoch).permutation(len(self.clips)))
            self._order = order
        return self.clips[order[1][index]]


class WindowBatches(Iterator[UInt8[np.ndarray, "B T H W 3"]]):
    """Batches of several shapes in turn, endless, read ahead by threads: in their order, whatever the threads do.

    Args:
      stretches: the clips.
      configs: the shapes.
      seed: of the run.
      start_step: the first batch is that of this step.
      host: this host's number; its part of a batch is given.
      hosts: how many there are.
      threads: that decode.

    Raises:
      UserError: no clip has room for a window of one of the shapes.
    """

    def __init__(
        self,
        stretches: Stretches,
        configs: Sequence[WindowConfig],
        *,
        seed: int,
        start_step: int = 0,
        host: int = 0,
        hosts: int = 1,
        threads: int = THREADS,
    ):
        self.windows = tuple(
            Windows(stretches, config, seed=seed + number, host=host, hosts=hosts)
            for number, config in enumerate(configs)
        )
        facts = (stretches.source.infos, stretches.limits, tuple(configs), seed)
        self.hash: str = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
        """With the step, the whole state of the data."""
        batches = grain.MapDataset.source(_InTurn(self.windows))[start_step:]
        ahead = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 2)
        self._batches = iter(batches.to_iter_dataset(ahead))

    @property
    def left_out(self) -> frozenset[str]:
        """Names of the clips that have no room for a window of any shape."""
        return frozenset.intersection(*(frozenset(windows.left_out) for windows in self.windows))

    def __next__(self) -> UInt8[np.ndarray, "B T H W 3"]:
        return next(self._batches)

    def close(self) -> None:
        """End the threads."""
        self._batches.close()


class _InTurn:
    """Step s is batch s // n of shape s % n."""

    def __init__(self, windows: Sequence[Windows]):
        self._windows = windows

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, step: int) -> UInt8[np.ndarray, "B T H W 3"]:
        number, shape = divmod(step, len(self._windows))
        return self._windows[shape][number]


def _fit_or_none(source: ClipSource, index: int, limits: SizeLimits) -> Grid | None:
    try:
        return fit(source.infos[index], limits)
    except UserError:
        return None


def _largest(sizes: Collection[Grid]) -> str:
    return "all are smaller than one multiple" if not sizes else "the largest is {}x{}x{}".format(*max(sizes))
