"""Batches of one shape for training the autoencoder: random windows of clips, in time and space."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8

from dit_video import rng
from dit_video.data.sizes import SizeLimits, fit, read_fitted, sampled_frames
from dit_video.data.source import ClipSource
from dit_video.errors import UserError
from dit_video.tokens import Grid

CACHE_BYTES = 2 << 30


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

    def __post_init__(self):
        if min(self.size) < 1 or self.batch < 1:
            raise UserError(f"windows of {tuple(self.size)} in batches of {self.batch}: each must be at least 1")


class Windows(Iterator[UInt8[np.ndarray, "B T H W 3"]]):
    """An endless iterator over batches. The batch of a step is a function of (source, limits, seed, step) alone.

    Every clip is seen once an epoch, in an order of its own; an epoch's end falls anywhere in a batch, so that a data
    set smaller than a batch fills it too. A clip longer than the limits is cut into stretches of its training length,
    of which one is drawn; the window lies anywhere in it.
    """

    def __init__(
        self,
        source: ClipSource,
        config: WindowConfig,
        *,
        limits: SizeLimits,
        seed: int,
        start_step: int = 0,
        cache_bytes: int = CACHE_BYTES,
    ):
        self._source, self._config, self._limits, self._seed = source, config, limits, seed
        fitted = {index: _fit_or_none(source, index, limits) for index in range(len(source))}
        self._sizes = {index: size for index, size in fitted.items() if size is not None}
        self.clips: tuple[int, ...] = tuple(
            index
            for index, size in self._sizes.items()
            if all(have >= want for have, want in zip(size, config.size, strict=True))
        )
        """The clips that are used."""
        self.left_out: tuple[str, ...] = tuple(
            source.infos[index].name for index in sorted(set(range(len(source))) - set(self.clips))
        )
        """Names of the clips that are smaller or shorter than a window at their training size."""
        if not self.clips:
            size = "{}x{}x{}".format(*config.size)
            raise UserError(
                f"none of the {len(source)} clips has a window of {size} at its training size "
                f"({_largest(self._sizes.values())}); use a smaller window, or raise max_pixels or max_frames"
            )
        self.step = start_step
        self._cache: dict[tuple[int, int], np.ndarray] = {}
        self._room = cache_bytes
        self._order: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))

    def __iter__(self) -> "Windows":
        return self

    def __next__(self) -> UInt8[np.ndarray, "B T H W 3"]:
        first = self.step * self._config.batch
        batch = np.stack([self._window(first + index) for index in range(self._config.batch)])
        self.step += 1
        return batch

    def _window(self, position: int) -> UInt8[np.ndarray, "T H W 3"]:
        clip = self._clip_at(position)
        generator = rng.host(self._seed, "windows", position)
        frames = self._frames(clip, int(generator.integers(self._stretches(clip))))
        t, h, w = (
            int(generator.integers(have - want + 1))
            for have, want in zip(frames.shape[:3], self._config.size, strict=True)
        )
        size = self._config.size
        return frames[t : t + size.t, h : h + size.h, w : w + size.w]

    def _clip_at(self, position: int) -> int:
        epoch, index = divmod(position, len(self.clips))
        if self._order[0] != epoch:
            self._order = (epoch, rng.host(self._seed, "window order", epoch).permutation(len(self.clips)))
        return self.clips[self._order[1][index]]

    def _stretches(self, clip: int) -> int:
        return -(-sampled_frames(self._source.infos[clip], self._limits) // self._sizes[clip].t)

    def _frames(self, clip: int, stretch: int) -> UInt8[np.ndarray, "T H W 3"]:
        """A stretch at the training size. What was decoded stays until the memory for it is full.

        What comes later is decoded at every use: as every clip comes once an epoch, throwing out the oldest would throw
        out what is needed again first.
        """
        frames = self._cache.get((clip, stretch))
        if frames is None:
            length = self._sizes[clip].t
            # The last stretch ends with the clip, and overlaps the one before it.
            start = min(stretch * length, sampled_frames(self._source.infos[clip], self._limits) - length)
            frames = read_fitted(self._source, clip, self._limits, start=start).frames
            if frames.nbytes <= self._room:
                self._room -= frames.nbytes
                self._cache[clip, stretch] = frames
        return frames


def windows(
    source: ClipSource,
    config: WindowConfig,
    *,
    limits: SizeLimits,
    seed: int,
    start_step: int = 0,
    cache_bytes: int = CACHE_BYTES,
) -> Windows:
    """Batches of windows from step `start_step` on; see `Windows`.

    Args:
      source: the clips.
      config: size and number of the windows.
      limits: what clips are resized to before a window is cut out.
      seed: of the run.
      start_step: the first batch is that of this step.
      cache_bytes: memory for decoded clips.

    Raises:
      UserError: no clip has room for a window.
    """
    return Windows(source, config, limits=limits, seed=seed, start_step=start_step, cache_bytes=cache_bytes)


def _fit_or_none(source: ClipSource, index: int, limits: SizeLimits) -> Grid | None:
    try:
        return fit(source.infos[index], limits)
    except UserError:
        return None


def _largest(sizes: Collection[Grid]) -> str:
    return "all are smaller than one multiple" if not sizes else "the largest is {}x{}x{}".format(*max(sizes))
