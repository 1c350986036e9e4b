"""Rows by number: what Grain reads, in threads or in worker processes.

A row's examples come from the plan, and of each example the choices that an epoch makes: which of its captions, and for
clips that are read from video files which stretch of time. All are functions of (seed, epoch, example).
"""

import functools
import hashlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8

from dit_video.core import rng
from dit_video.core.errors import DecodeError, UserError
from dit_video.data.captions import Text, Texts
from dit_video.data.clips import ClipSource
from dit_video.data.latents.cache import LatentSource
from dit_video.data.packing.balance import Balance
from dit_video.data.packing.mixture import Mixture
from dit_video.data.packing.plan import RowStream
from dit_video.data.prefetch import ENDLESS
from dit_video.data.sizes import SizeLimits, fit, read_fitted, sampled_frames
from dit_video.tokens import Grid, Item, Rows, RowShape, coordinates, pack, patchify, token_grid

Encode = Callable[[Sequence[UInt8[np.ndarray, "T H W 3"]]], list[Float32[np.ndarray, "t h w c"]]]
"""Clips of any sizes to their latents."""


class Member(NamedTuple):
    """An example in its place in a row."""

    example: int
    rank: int
    """its running number in the plan"""
    epoch: int
    caption: int
    """the number of the one that this epoch draws"""


class Encoded(NamedTuple):
    """What was made of a clip, in patches."""

    tokens: Float32[np.ndarray, "n p"]
    shown: Float32[np.ndarray, "n p"] | None = None
    """of its first frame with grey behind it"""
    image: Float32[np.ndarray, "i F"] | None = None
    """an image encoder's tokens of its first frame"""
    lost: bool = False
    """whether it was damaged: then all is zero"""

    @property
    def nbytes(self) -> int:
        """of memory"""
        return sum(values.nbytes for values in self[:3] if values is not None)


class Layout:
    """Which examples share a row, where their tokens lie, and which caption each has.

    A plan reserves room for the longest of an example's captions, so that every one fits.

    Args:
      grids: of every example, in tokens.
      texts: the captions of every example; those that are drawn are read when a row is packed.
      shape: the budgets of a row.
      seed: of the run.
      names: of the examples, for errors.
      mixture: which examples an epoch has; None for each one once.
      balance: how rows are put into steps; None for random order.
      intervals: of two tokens along time, for each example, in the unit of the coordinates; None counts tokens.
      pairs: how many tokens of a grid attend to each other; None where all do.

    Raises:
      UserError: an example larger than a row, or a mixture of other examples.
    """

    def __init__(
        self,
        grids: Sequence[Grid],
        texts: Texts,
        *,
        shape: RowShape,
        seed: int,
        names: Sequence[str],
        mixture: Mixture | None = None,
        balance: Balance | None = None,
        intervals: Sequence[float] | None = None,
        pairs: Callable[[Grid], float] | None = None,
    ):
        self.grids, self.texts, self.shape, self.names, self._seed = grids, texts, shape, names, seed
        self._intervals = intervals
        counted = None if pairs is None else {grid: float(pairs(grid)) for grid in set(grids)}
        self.stream = RowStream(
            np.asarray([grid.volume for grid in grids], np.int64),
            np.asarray([max(lengths) for lengths in texts.lengths], np.int64),
            shape,
            seed=seed,
            names=names,
            mixture=mixture,
            balance=balance,
            pairs=None if counted is None else np.asarray([counted[grid] for grid in grids]),
        )
        told = hashlib.sha256(repr((self.stream.hash, tuple(names), tuple(grids))).encode())
        for facts in texts.facts():
            told.update(facts)
        if intervals is not None:
            told.update(repr(tuple(intervals)).encode())
        self.hash: str = told.hexdigest()[:16]
        """Of the plan, the examples' names, sizes and texts."""

    def members(self, number: int) -> list[Member]:
        """The examples of row `number`."""
        epoch = number // self.stream.rows_per_epoch
        examples, ranks = self.stream.row(number)
        return [
            Member(example, rank, epoch, self._caption(example, epoch))
            for example, rank in zip(examples.tolist(), ranks.tolist(), strict=True)
        ]

    def pack(self, members: Sequence[Member], clips: Sequence[Encoded]) -> Rows:
        """One row. Members that are damaged keep their place, and do not count in the loss."""
        items, valid = [], []
        for member, clip in zip(members, clips, strict=True):
            text = read_text(self.texts, member.example, member.caption, self.names[member.example])
            valid.append(not clip.lost and text is not None)
            interval = 1.0 if self._intervals is None else self._intervals[member.example]
            items.append(
                Item(
                    clip.tokens,
                    _coordinates(self.grids[member.example], interval),
                    self.texts.empty if text is None else text,
                    member.rank,
                    clip.shown,
                    clip.image,
                )
            )
        row = pack(items, self.shape, width=clips[0].tokens.shape[1], text_width=self.texts.width)
        row.valid[: len(valid)] = valid
        return row

    def _caption(self, example: int, epoch: int) -> int:
        count = len(self.texts.lengths[example])
        return 0 if count == 1 else int(rng.host(self._seed, "caption", epoch, example).integers(count))


class LatentRows:
    """Packed rows of cached latents."""

    def __init__(self, source: LatentSource, layout: Layout, patch: Grid, *, cache_bytes: int):
        self._source, self._layout, self._patch, self._room = source, layout, patch, cache_bytes
        self._clips: dict[int, Encoded] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, number: int) -> Rows:
        members = self._layout.members(number)
        return self._layout.pack(members, [self._clip(member.example) for member in members])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_clips": {}, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= {**state, "_lock": threading.Lock()}

    def _clip(self, example: int) -> Encoded:
        """An example's patches. What was read stays until the memory for it is full."""
        clip, source = self._clips.get(example), self._source
        if clip is None:
            try:
                latents, shown, image = source[example], source.shown(example), source.image(example)
            except DecodeError as error:
                set_aside(self._layout.names[example], error)
                return self._lost(example)
            clip = Encoded(self._patches(latents), None if shown is None else self._patches(shown), image)
            with self._lock:
                if clip.nbytes <= self._room and example not in self._clips:
                    self._room -= clip.nbytes
                    self._clips[example] = clip
        return clip

    def _patches(self, latents: Float32[np.ndarray, "t h w c"]) -> Float32[np.ndarray, "n p"]:
        return np.ascontiguousarray(patchify(latents, self._patch))

    def _lost(self, example: int) -> Encoded:
        source = self._source
        tokens = _nothing(self._layout.grids[example], self._patch, source.channels)
        image = None if source.image_shape is None else np.zeros(source.image_shape, np.float32)
        return Encoded(tokens, tokens if source.has_shown else None, image, lost=True)


class ClipRow(NamedTuple):
    """A row of clips that are decoded, and not encoded yet."""

    members: list[Member]
    clips: list[UInt8[np.ndarray, "T H W 3"] | None]
    """None where a clip turned out to be damaged"""


class ClipRows:
    """Rows of clips from their video files, each at its training size, from a start that the epoch draws."""

    def __init__(self, source: ClipSource, layout: Layout, limits: SizeLimits, *, seed: int):
        self._source, self._layout, self._limits, self._seed = source, layout, limits, seed

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, number: int) -> ClipRow:
        members = self._layout.members(number)
        return ClipRow(members, [self._frames(member) for member in members])

    def _frames(self, member: Member) -> UInt8[np.ndarray, "T H W 3"] | None:
        info = self._source.infos[member.example]
        spare = sampled_frames(info, self._limits) - fit(info, self._limits).t
        start = int(rng.host(self._seed, "start", member.epoch, member.example).integers(spare + 1))
        try:
            return read_fitted(self._source, member.example, self._limits, start=start).frames
        except DecodeError as error:
            set_aside(info.name, error)
            return None


def encoded_row(
    row: ClipRow, latents: Iterator[Float32[np.ndarray, "_ _ _ _"]], layout: Layout, patch: Grid, *, channels: int
) -> Rows:
    """Pack a row's clips, whose latents come next."""
    clips = []
    for member, clip in zip(row.members, row.clips, strict=True):
        if clip is None:
            clips.append(Encoded(_nothing(layout.grids[member.example], patch, channels), lost=True))
        else:
            clips.append(Encoded(np.ascontiguousarray(patchify(next(latents), patch))))
    return layout.pack(row.members, clips)


def _nothing(grid: Grid, patch: Grid, channels: int) -> Float32[np.ndarray, "n p"]:
    return np.zeros((grid.volume, patch.volume * channels), np.float32)


def latent_grids(source: LatentSource, patch: Grid) -> list[Grid]:
    """Of every example, in tokens.

    Raises:
      UserError: latents that the patch does not divide.
    """
    return [_named(name, token_grid, size, patch) for name, size in zip(source.names, source.sizes, strict=True)]


def _named(name: str, function: Callable, *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def read_text(texts: Texts, example: int, caption: int, name: str) -> Text | None:
    """One caption of an example; None, and a warning that names the example, where its record is damaged."""
    try:
        return texts.read(example, caption)
    except DecodeError as error:
        set_aside(name, error)
        return None


def set_aside(name: str, error: UserError) -> None:
    """Say that a clip turned out to be damaged."""
    logging.getLogger(__name__).warning("%s is damaged and is left out of the loss: %s", name, error)


@functools.lru_cache(maxsize=1024)
def _coordinates(grid: Grid, interval: float) -> Float32[np.ndarray, "n 3"]:
    return coordinates(grid, step=(interval, 1.0, 1.0))
