"""Random access to packed rows by number, which Grain reads in threads or worker processes.

The plan says which examples share a row. An epoch draws one caption of each example and, for clips that are read from
video files, a temporal crop. These choices are functions of (seed, epoch, example).
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
"""A function from clips of any sizes to their latents."""


class Member(NamedTuple):
    """An example of a row, with the choices that the epoch makes."""

    example: int
    rank: int
    """Running number of the example in the plan."""
    epoch: int
    caption: int
    """Number of the caption that this epoch draws."""


class Encoded(NamedTuple):
    """The patches of an encoded clip."""

    tokens: Float32[np.ndarray, "n p"]
    shown: Float32[np.ndarray, "n p"] | None = None
    """Patches of the latents of the clip whose frames after the first are grey."""
    image: Float32[np.ndarray, "i F"] | None = None
    """Tokens of the first frame from an image encoder."""
    lost: bool = False
    """True if the clip was damaged: then all values are zero."""

    @property
    def nbytes(self) -> int:
        """Return the memory of all arrays, in bytes."""
        return sum(values.nbytes for values in self[:3] if values is not None)


class Layout:
    """The layout of packed rows: the examples of each row, the positions of their tokens, and their captions.

    The plan reserves room for the longest caption of an example, so that every caption fits.

    Args:
      grids: grid of every example, in tokens.
      captions: captions of every example; the drawn ones are read when a row is packed.
      shape: budgets of a row.
      seed: seed of the run.
      names: names of the examples, for errors.
      mixture: choice of an epoch's examples; None for each example once.
      balance: configuration of the order of rows; None for a random order.
      token_dt: spacing of consecutive tokens along time for each example, in the unit of the positions; None counts
        tokens.
      attention_pairs: function from a grid to its token pairs in attention; None for full attention.

    Raises:
      UserError: an example is larger than a row, or the mixture is of other examples.
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
        grid_pairs = None if pairs is None else {grid: float(pairs(grid)) for grid in set(grids)}
        self.stream = RowStream(
            np.asarray([grid.volume for grid in grids], np.int64),
            np.asarray([max(lengths) for lengths in texts.lengths], np.int64),
            shape,
            seed=seed,
            names=names,
            mixture=mixture,
            balance=balance,
            pairs=None if grid_pairs is None else np.asarray([grid_pairs[grid] for grid in grids]),
        )
        content = hashlib.sha256(repr((self.stream.hash, tuple(names), tuple(grids))).encode())
        for facts in texts.facts():
            content.update(facts)
        if intervals is not None:
            content.update(repr(tuple(intervals)).encode())
        self.hash: str = content.hexdigest()[:16]
        """Hash of the plan and of the examples' names, sizes and captions."""

    def members(self, number: int) -> list[Member]:
        """Return the examples of row `number`."""
        epoch = number // self.stream.rows_per_epoch
        examples, ranks = self.stream.row(number)
        return [
            Member(example, rank, epoch, self._caption(example, epoch))
            for example, rank in zip(examples.tolist(), ranks.tolist(), strict=True)
        ]

    def pack(self, members: Sequence[Member], clips: Sequence[Encoded]) -> Rows:
        """Pack one row. Damaged examples keep their segment, but do not count in the loss."""
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
    """A random-access data source of packed rows from cached latents."""

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
        """Return the patches of an example, which are cached until the memory for them is full."""
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
    """A row of clips that are decoded, but not encoded yet."""

    members: list[Member]
    clips: list[UInt8[np.ndarray, "T H W 3"] | None]
    """Frames of each clip; None for a clip that is damaged."""


class ClipRows:
    """A random-access data source of rows decoded from video files, at training size, from a start drawn per epoch."""

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
    """Pack a row of clips, taking their latents from the iterator."""
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
    """Return the grid of every example, in tokens.

    Raises:
      UserError: the patch does not divide the latents.
    """
    return [_named(name, token_grid, size, patch) for name, size in zip(source.names, source.sizes, strict=True)]


def _named(name: str, function: Callable, *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def read_text(texts: Texts, example: int, caption: int, name: str) -> Text | None:
    """Return one caption of an example; if its record is damaged, log a warning with its name and return None."""
    try:
        return texts.read(example, caption)
    except DecodeError as error:
        set_aside(name, error)
        return None


def set_aside(name: str, error: UserError) -> None:
    """Log a warning that a clip is damaged."""
    logging.getLogger(__name__).warning("%s is damaged and does not count in the loss: %s", name, error)


@functools.lru_cache(maxsize=1024)
def _coordinates(grid: Grid, interval: float) -> Float32[np.ndarray, "n 3"]:
    return coordinates(grid, step=(interval, 1.0, 1.0))
