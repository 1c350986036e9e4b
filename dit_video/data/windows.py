"""Batches of one shape for training the autoencoder: random windows of clips, in time and space.

Windows are uint8, as they are decoded, so that no pixel can be NaN or out of range. A clip that cannot be decoded is
logged by its name, and replaced by another one. Windows are augmented at random for autoencoders that train on few
scenes and must generalise to others.
"""

import hashlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import grain
import numpy as np
from jaxtyping import Float, Int, UInt8

from dit_video.core import rng
from dit_video.core.errors import DecodeError, UserError, check_at_least
from dit_video.data.clips import ClipSource
from dit_video.data.damage import log_damaged_clip
from dit_video.data.prefetch import DECODE_THREADS, ENDLESS_LENGTH
from dit_video.data.sizes import SizeLimits, count_all_sampled_frames, fit_sizes, hash_clips, read_fitted_clip
from dit_video.tokens import Grid

CACHE_BYTES = 2 << 30
_MIN_GAIN = 0.05
"""Smallest share of the clips' pixels for which windows of a further shape are worth a program of their own."""
_MAX_ATTEMPTS = 8
"""Maximum number of clips that are tried in sequence if clips are damaged."""
_SPEED_STD = 2.5
"""Standard deviation of the ellipse's speed along each axis, in pixels per frame."""
_RADIUS_RANGE = (8.0, 40.0)
"""Range of the ellipse's radii, in pixels."""


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Configuration of the random changes to a window.

    With a probability of one half each, a window is mirrored, reversed in time, downscaled from twice the size, and
    inverted; its colour channels are permuted at random.

    Raises:
      UserError: If `composite_prob` is not a probability.
    """

    transpose: bool = False
    """True to also exchange height and width of square windows, with a probability of one half."""
    composite_prob: float = 0.0
    """Probability that a second window is visible inside a moving ellipse. It adds occlusions, which clips of a single
    room lack (CutMix, arXiv 1905.04899, but in motion)."""

    def __post_init__(self):
        if not 0 <= self.composite_prob <= 1:
            raise UserError(f"composite_prob={self.composite_prob} is invalid: it is a probability. Use 0 to 1.")


@dataclass(frozen=True, kw_only=True)
class WindowConfig:
    """Configuration of the windows that the autoencoder is trained on.

    Raises:
      UserError: If a size or the batch is below 1, or windows that are not square are to be transposed.
    """

    size: Grid
    """Frames, height and width of a window, in pixels."""
    batch: int
    """Windows per step."""
    augment: Augmentation | None = None
    """Random augmentation of the windows; None for no augmentation."""

    def __post_init__(self):
        if self.augment is not None and self.augment.transpose and self.size.h != self.size.w:
            raise UserError(f"transpose=True is invalid: windows of {self.size!r} are not square. Use transpose=False.")
        check_at_least(1, size=min(self.size), batch=self.batch)


class ClipCrops:
    """A source of clips at their training size, in temporal crops of their training length.

    Decoded crops are cached until the memory is full; further ones are decoded at every use. Nothing is evicted: as
    every clip is used once per epoch, the oldest crop is the one that is needed again first. Thread-safe.

    Args:
      source: The clips.
      limits: Limits of the training sizes.
      cache_bytes: Memory for decoded clips.
    """

    def __init__(self, source: ClipSource, limits: SizeLimits, *, cache_bytes: int = CACHE_BYTES):
        self.source, self.limits, self._free_bytes = source, limits, cache_bytes
        self.sizes = fit_sizes(source, limits, allow_misfits=True)
        """Training size of every clip; zeros for one that has none."""
        self._frame_counts = count_all_sampled_frames(source, limits)
        self._cache: dict[tuple[int, int], np.ndarray] = {}
        self._lock = threading.Lock()

    def count_crops(self, clip: int) -> int:
        """Return the number of crops of a clip; the last one may overlap the one before it."""
        return int(-(-self._frame_counts[clip] // self.sizes[clip, 0]))

    def read_crop(self, clip: int, crop: int) -> UInt8[np.ndarray, "T H W 3"]:
        """Return the frames of one crop."""
        frames = self._cache.get((clip, crop))
        if frames is None:
            length = int(self.sizes[clip, 0])
            start = min(crop * length, int(self._frame_counts[clip]) - length)
            frames = read_fitted_clip(self.source, clip, self.limits, start=start).frames
            with self._lock:
                if frames.nbytes <= self._free_bytes and (clip, crop) not in self._cache:
                    self._free_bytes -= frames.nbytes
                    self._cache[clip, crop] = frames
        return frames


@dataclass(frozen=True, kw_only=True)
class FittedWindows:
    """Choice of the windows that the autoencoder is trained on: a few shapes that follow from the clips.

    Every clip has room for one of them. They are as large as the clips and the limits below allow, in the aspect ratios
    of most clips.

    Raises:
      UserError: If a value is below 1.
    """

    frames: int = 9
    """Maximum number of frames."""
    pixels: int = 64 * 64
    """Maximum number of pixels of a frame."""
    batch: int = 8
    """Windows per step of the largest shapes; of smaller shapes, up to four times as many."""
    shapes: int = 3
    """Number of shapes; there is one more if some clips are smaller than all of them."""
    augment: Augmentation | None = None
    """Random augmentation of the windows, of which square ones alone are transposed; None for no augmentation."""

    def __post_init__(self):
        check_at_least(1, frames=self.frames, pixels=self.pixels, batch=self.batch, shapes=self.shapes)

    def choose(self, crops: ClipCrops) -> tuple[WindowConfig, ...]:
        """Return the windows for these clips.

        One shape after the other is added, the one by which most of the clips' pixels are newly seen: a clip's share is
        that of its largest window, among those that the limits allow.

        Raises:
          UserError: If no clip has a training size.
        """
        sizes, counts = np.unique(crops.sizes[crops.sizes[:, 0] > 0], axis=0, return_counts=True)
        if not len(sizes):
            raise UserError("no clip has a training size: all are smaller than one multiple. Use larger clips.")
        largest = np.array([self._limit(Grid(*size), crops.limits.multiple) for size in sizes.tolist()])
        candidates = np.unique(largest, axis=0)
        fits = (candidates[:, None] <= sizes).all(axis=-1)
        shares = np.where(fits, candidates.prod(axis=1)[:, None] / largest.prod(axis=1), 0.0)
        chosen: list[np.ndarray] = []
        best = np.zeros(len(sizes))
        while len(chosen) < self.shapes:
            gains = np.maximum(shares - best, 0) @ counts / counts.sum()
            if gains.max() < _MIN_GAIN:
                break
            chosen.append(candidates[gains.argmax()])
            best = np.maximum(best, shares[gains.argmax()])
        if (best == 0).any():
            chosen.append(largest[best == 0].min(axis=0))
        return tuple(self._make_window(Grid(*size.tolist())) for size in chosen)

    def get_largest(self, limits: SizeLimits) -> WindowConfig:
        """Return a square window as large as the limits of clips allow, for a plan without clips."""
        side = int(limits.max_pixels**0.5)
        size = Grid(limits.max_frames, *(max(step, side // step * step) for step in limits.multiple[1:]))
        return self._make_window(self._limit(size, limits.multiple))

    def _limit(self, size: Grid, multiple: Grid) -> Grid:
        """Return the largest window of a clip of this size, which is one of the training sizes."""
        frames = min(size.t, 1 + (self.frames - 1) // multiple.t * multiple.t)
        scale = min(1.0, (self.pixels / (size.h * size.w)) ** 0.5)
        sides = zip(size[1:], multiple[1:], strict=True)
        frame = np.array([max(step, int(side * scale) // step * step) for side, step in sides])
        for axis in np.argsort(size[1:])[::-1]:  # rounding down may have left room for one step more
            longer = frame + np.eye(2, dtype=int)[axis] * multiple[1:]
            if longer.prod() <= self.pixels and (longer <= size[1:]).all():
                frame = longer
        return Grid(frames, *frame.tolist())

    def _make_window(self, size: Grid) -> WindowConfig:
        more, augment = min(4, max(1, self.frames * self.pixels // size.volume)), self.augment
        if augment is not None and size.h != size.w:
            augment = replace(augment, transpose=False)
        return WindowConfig(size=size, batch=self.batch * more, augment=augment)


class Windows:
    """A sequence of batches of one shape; each is a function of (clips, limits, seed, number) alone.

    Every clip is used once per epoch, in an order that differs by epoch. Epochs may end within a batch, so that a data
    set smaller than a batch fills it too. One crop of the clip is drawn, and the window at a random position in it.

    Args:
      crops: The clips.
      config: Size and number of the windows.
      seed: Seed of the run.
      host: Index of this host; batches hold its share alone.
      hosts: Number of hosts.

    Raises:
      UserError: If no clip has room for a window, or the batch does not divide among the hosts.
    """

    def __init__(self, crops: ClipCrops, config: WindowConfig, *, seed: int, host: int = 0, hosts: int = 1):
        if config.batch % hosts:
            raise UserError(f"batch={config.batch} is invalid: it does not divide among hosts={hosts}. Use a multiple.")
        self._host_batch, self._host = config.batch // hosts, host
        self._crops, self._config, self._seed = crops, config, seed
        fits = (crops.sizes >= config.size).all(axis=1)
        self.clips: Int[np.ndarray, " n"] = np.flatnonzero(fits)
        """Numbers of the clips that are used."""
        infos = crops.source.infos
        self.excluded_clips = tuple(infos[index].name for index in np.flatnonzero(~fits).tolist())
        """Names of the clips that are smaller or shorter than a window at training size."""
        if not len(self.clips):
            largest = Grid(*max(crops.sizes.tolist(), default=(0, 0, 0)))
            described = f"the largest is {largest}" if largest.t else "all are smaller than one multiple"
            raise UserError(
                f"none of the {len(infos)} clips has a window of {config.size} at its training size ({described}). "
                "Use a smaller window, or raise max_pixels or max_frames."
            )
        self._order: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))

    def __getitem__(self, number: int) -> UInt8[np.ndarray, "B T H W 3"]:
        first = number * self._config.batch + self._host * self._host_batch
        return np.stack([self._get_window(first + index) for index in range(self._host_batch)])

    def _get_window(self, position: int) -> UInt8[np.ndarray, "T H W 3"]:
        generator = rng.make_generator(self._seed, "windows", position)
        window = self._cut_window([self._get_clip(position + attempt) for attempt in range(_MAX_ATTEMPTS)], generator)
        augment = self._config.augment
        if augment is None or not augment.composite_prob or generator.random() >= augment.composite_prob:
            return window
        others = self.clips[generator.integers(len(self.clips), size=_MAX_ATTEMPTS)].tolist()
        return composite(window, self._cut_window(others, generator), generator)

    def _cut_window(self, clips: Sequence[int], generator: np.random.Generator) -> UInt8[np.ndarray, "T H W 3"]:
        """Return a random window of the first of these clips that can be decoded."""
        frames, size, augment = self._read_crop(clips, generator), self._config.size, self._config.augment
        max_zoom = 1 if augment is None else min(2, frames.shape[1] // size.h, frames.shape[2] // size.w)
        zoom = int(generator.integers(max_zoom)) + 1
        size = Grid(size.t, zoom * size.h, zoom * size.w)
        t, h, w = (int(generator.integers(full - part + 1)) for full, part in zip(frames.shape[:3], size, strict=True))
        window = frames[t : t + size.t, h : h + size.h, w : w + size.w]
        return window if augment is None else augment_window(window, zoom, augment.transpose, generator)

    def _read_crop(self, clips: Sequence[int], generator: np.random.Generator) -> UInt8[np.ndarray, "T H W 3"]:
        """Return a random crop of the first of these clips that can be decoded; a warning is logged for the others."""
        for clip in clips:
            try:
                return self._crops.read_crop(clip, int(generator.integers(self._crops.count_crops(clip))))
            except DecodeError as error:
                log_damaged_clip(self._crops.source.infos[clip].name, error)
        raise UserError(f"{len(clips)} clips in a row cannot be decoded. Ingest the clips again.")

    def _get_clip(self, position: int) -> int:
        epoch, index = divmod(position, len(self.clips))
        order = self._order  # read once: another thread may replace it by the order of another epoch
        if order[0] != epoch:
            order = (epoch, rng.make_generator(self._seed, "window order", epoch).permutation(len(self.clips)))
            self._order = order
        return int(self.clips[order[1][index]])


class WindowBatches(Iterator[UInt8[np.ndarray, "B T H W 3"]]):
    """An endless iterator over batches of several shapes in turn, read ahead by threads in a deterministic order.

    Args:
      crops: The clips.
      configs: Configuration of each shape.
      seed: Seed of the run.
      start_step: Step of the first batch.
      host: Index of this host; batches hold its share alone.
      hosts: Number of hosts.
      threads: Number of threads that decode.

    Raises:
      UserError: If no clip has room for a window of one of the shapes.
    """

    def __init__(
        self,
        crops: ClipCrops,
        configs: Sequence[WindowConfig],
        *,
        seed: int,
        start_step: int = 0,
        host: int = 0,
        hosts: int = 1,
        threads: int = DECODE_THREADS,
    ):
        shares = {"host": host, "hosts": hosts}
        self.windows = tuple(Windows(crops, config, seed=seed + n, **shares) for n, config in enumerate(configs))
        content = (hash_clips(crops.source), crops.limits, tuple(configs), seed)
        self.hash: str = hashlib.sha256(repr(content).encode()).hexdigest()[:16]
        """Hash of the clips and the configuration: with the step, the whole state of the data."""
        steps, windows, shapes = grain.MapDataset.range(start_step, ENDLESS_LENGTH), self.windows, len(configs)
        batches = steps.map(lambda step: windows[step % shapes][step // shapes])
        ahead = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 2)
        self._batches = iter(batches.to_iter_dataset(ahead))

    @property
    def excluded_clips(self) -> frozenset[str]:
        """Return the names of the clips that have no room for a window of any shape."""
        return frozenset.intersection(*(frozenset(windows.excluded_clips) for windows in self.windows))

    def __next__(self) -> UInt8[np.ndarray, "B T H W 3"]:
        return next(self._batches)

    def close(self) -> None:
        """Stop the threads."""
        self._batches.close()


def augment_window(
    window: UInt8[np.ndarray, "T H W 3"], zoom: int, transpose: bool, generator: np.random.Generator
) -> UInt8[np.ndarray, "T h w 3"]:
    """Return the window downscaled by `zoom` and changed at random, see `Augmentation`."""
    if zoom > 1:
        cells = window.reshape(len(window), window.shape[1] // zoom, zoom, window.shape[2] // zoom, zoom, 3)
        window = np.rint(cells.mean(axis=(2, 4), dtype=np.float32)).astype(np.uint8)
    reverse, mirror, invert = generator.integers(2, size=3)
    window = window[:: -1 if reverse else 1, :, :: -1 if mirror else 1, generator.permutation(3)]
    window = 255 - window if invert else window
    return window.transpose(0, 2, 1, 3) if transpose and generator.integers(2) else window


def composite(
    window: UInt8[np.ndarray, "T H W 3"], other: UInt8[np.ndarray, "T H W 3"], generator: np.random.Generator
) -> UInt8[np.ndarray, "T H W 3"]:
    """Show a second window inside a moving ellipse; its pixels move along with the ellipse and wrap around."""
    length, height, width = window.shape[:3]
    speed = generator.normal(size=2) * _SPEED_STD
    start = generator.uniform(0, 1, 2) * (height, width)
    radii = generator.uniform(*_RADIUS_RANGE, 2)
    angle = generator.uniform(0, np.pi)
    result = window.copy()
    for t in range(length):
        offset = (t - length / 2) * speed
        inside = _draw_ellipse(height, width, start + offset, radii, angle)
        down, right = (int(np.rint(pixels)) for pixels in offset)
        moved = np.roll(other[t], (down, right), (0, 1))
        result[t] = np.rint(window[t] * (1 - inside) + moved * inside)
    return result


def _draw_ellipse(
    height: int, width: int, centre: Float[np.ndarray, "2"], radii: Float[np.ndarray, "2"], angle: float
) -> Float[np.ndarray, "H W 1"]:
    """Return an anti-aliased mask: 1 inside, 0 outside, with an edge of about one pixel."""
    rows, columns = np.mgrid[:height, :width]
    y, x = rows - centre[0], columns - centre[1]
    along = (np.cos(angle) * y + np.sin(angle) * x) / radii[0]
    across = (-np.sin(angle) * y + np.cos(angle) * x) / radii[1]
    return np.clip((1 - np.sqrt(along**2 + across**2)) * radii.min() + 0.5, 0, 1)[..., None]
