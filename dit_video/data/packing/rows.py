"""Random access to packed rows by number, which Grain reads in threads or worker processes.

The plan says which examples share a row. An epoch draws one caption of each example and, for clips that are read from
video files, a temporal crop. These choices are functions of (seed, epoch, example).
"""

import functools
import hashlib
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Float, Float32, Int, UInt8

from dit_video.core import rng
from dit_video.core.errors import DecodeError, UserError
from dit_video.core.grid import find_distinct_grids
from dit_video.core.shared_array import SharedStrings, SharesArrays
from dit_video.data.captions import CaptionSource
from dit_video.data.clips import ClipSource
from dit_video.data.latents.cache import LatentSource
from dit_video.data.packing.balance import Balance
from dit_video.data.packing.bin_packing import CanvasPacking
from dit_video.data.packing.mask_mix import MaskMix
from dit_video.data.packing.mixture import Mixture
from dit_video.data.packing.plan import RowStream
from dit_video.data.sizes import SizeLimits, count_sampled_frames, fit_size, read_fitted_clip
from dit_video.models.conditioning import IsKnown, fold_mask
from dit_video.models.encoders import CaptionTokens
from dit_video.tokens import (
    CanvasShape,
    Field,
    Grid,
    LayoutShape,
    PackedBatch,
    PackedExample,
    compute_positions,
    compute_token_grid,
    pack,
    patchify,
)

T = TypeVar("T")
ENDLESS_LENGTH = 1 << 40
"""Length of endless data sets, as Grain requires a length."""


@runtime_checkable
class Encode(Protocol):
    """A function from clips of any sizes to their latents."""

    def __call__(
        self, clips: Sequence[UInt8[np.ndarray, "_ _ _ 3"]], masks: Sequence[IsKnown] | None = None, /
    ) -> list[Float32[np.ndarray, "_ _ _ c"]]:
        """Return the latents of clips, or of the clips with all but the known pixels grey."""


class RowEntry(NamedTuple):
    """An example of a row, with the choices that the epoch makes."""

    example: int
    rank: int
    """Running number of the example in the plan."""
    epoch: int
    caption: int
    """Number of the caption that this epoch draws."""


class EncodedClip(NamedTuple):
    """The patches of an encoded clip."""

    tokens: Float32[np.ndarray, "n p"]
    fields: Mapping[str, np.ndarray] = {}
    """Further fields, as a row takes them."""
    is_damaged: bool = False
    """True if the clip was damaged: then all values are zero."""

    @property
    def nbytes(self) -> int:
        """Return the memory of all arrays, in bytes."""
        return self.tokens.nbytes + sum(values.nbytes for values in self.fields.values())


class RowLayout(SharesArrays):
    """The examples of each row or canvas, the positions of their tokens, and their captions.

    The plan reserves room for the longest caption of an example, so that every caption fits.

    Args:
      grids: Grid of every example, in tokens.
      captions: Captions of every example; the drawn ones are read when a row is packed.
      shape: Budgets of a row.
      seed: Seed of the run.
      names: Names of the examples, for errors and the hash.
      mixture: Choice of an epoch's examples; None for each example once.
      balance: Configuration of the order of rows; None for a random order.
      token_dt: Spacing of consecutive tokens along time for each example, in the unit of the positions; None counts
        tokens.
      attention_pairs: Function from a grid to its token pairs in attention; None for full attention.
      token_lead: Fraction of `token_dt` by which all tokens but a clip's first begin earlier.

    Raises:
      UserError: If an example is larger than a row, or the mixture is for other examples.
    """

    def __init__(
        self,
        grids: Sequence[Grid] | Int[np.ndarray, "n 3"],
        captions: CaptionSource,
        *,
        shape: LayoutShape,
        seed: int,
        names: Sequence[str],
        mixture: Mixture | None = None,
        balance: Balance | None = None,
        token_dt: Float[np.ndarray, " n"] | None = None,
        attention_pairs: Callable[[Grid], float] | None = None,
        token_lead: float = 0.0,
    ):
        grids = np.asarray(grids, np.int32)
        self.grids, self.captions, self.shape, self._seed = grids, captions, shape, seed
        self.names = names if isinstance(names, SharedStrings) else SharedStrings(names)
        self._token_dt, self._token_lead = token_dt, token_lead
        grid_pairs = None
        if attention_pairs is not None:
            distinct, _, kinds = find_distinct_grids(grids)
            grid_pairs = np.asarray([float(attention_pairs(grid)) for grid in distinct])[kinds]
        text = captions.lengths.longest.astype(np.int64)
        self.stream = RowStream(
            grids.prod(axis=1, dtype=np.int64),
            text,
            shape,
            seed=seed,
            names=names,
            mixture=mixture,
            balance=balance,
            attention_pairs=grid_pairs,
            canvases=CanvasPacking(grids, text, shape, names) if isinstance(shape, CanvasShape) else None,
        )
        content = hashlib.sha256(self.stream.hash.encode())
        for values in (self.names.content, self.names.offsets.astype("<i8"), grids.astype("<i4")):
            content.update(values.tobytes())
        for facts in captions.iter_hash_bytes():
            content.update(facts)
        if token_dt is not None:
            content.update(token_dt.astype("<f8").tobytes() + repr(token_lead).encode())
        self.hash: str = content.hexdigest()[:16]
        """Hash of the plan and of the examples' names, sizes and captions."""

    def get_grid(self, example: int) -> Grid:
        """Return the grid of an example, in tokens."""
        return Grid(*self.grids[example].tolist())

    def get_entries(self, number: int) -> list[RowEntry]:
        """Return the examples of row `number`."""
        epoch = number // self.stream.rows_per_epoch
        examples, ranks = self.stream.get_row(number)
        pairs = zip(examples.tolist(), ranks.tolist(), strict=True)
        return [RowEntry(example, rank, epoch, self._draw_caption(example, epoch)) for example, rank in pairs]

    def pack(
        self, entries: Sequence[RowEntry], clips: Sequence[EncodedClip], *, fields: Sequence[Field] = ()
    ) -> PackedBatch:
        """Pack one row with these fields. Damaged examples keep their segment, but do not count in the loss."""
        items, valid = [], []
        for entry, clip in zip(entries, clips, strict=True):
            text = read_caption(self.captions, entry.example, entry.caption, self.names[entry.example])
            valid.append(not clip.is_damaged and text is not None)
            interval = 1.0 if self._token_dt is None else float(self._token_dt[entry.example])
            positions = get_positions(self.get_grid(entry.example), interval, self._token_lead)
            text = self.captions.empty if text is None else text
            items.append(PackedExample(clip.tokens, positions, text, entry.rank, clip.fields))
        widths = {"width": clips[0].tokens.shape[1], "text_width": self.captions.width}
        row = pack(items, self.shape, **widths, fields=fields)
        row.valid[: len(valid)] = valid
        return row

    def _draw_caption(self, example: int, epoch: int) -> int:
        seed = self._seed, "caption", epoch, example
        return self.captions.lengths.draw(example, lambda: rng.make_generator(*seed))


class LatentRows:
    """Random access to packed rows of cached latents. With a mask mix, the cache holds every kind of mask."""

    def __init__(
        self,
        source: LatentSource,
        layout: RowLayout,
        patch: Grid,
        *,
        cache_bytes: int,
        mask_mix: MaskMix | None = None,
    ):
        self._source, self._layout, self._patch, self._free_bytes = source, layout, patch, cache_bytes
        self._mask_mix = mask_mix
        fields = source.fields
        if mask_mix is not None:
            cached = {field for pair in mask_mix.list_cached_fields() for field in pair}
            fields = (*(field for field in source.fields if field not in cached), *mask_mix.fields)
        self._fields = [field.to_rows(patch) for field in fields]
        self._clips: dict[int, EncodedClip] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return ENDLESS_LENGTH

    def __getitem__(self, number: int) -> PackedBatch:
        entries = self._layout.get_entries(number)
        clips = [self._get_clip(entry.example) for entry in entries]
        if (mix := self._mask_mix) is not None:
            pairs = zip(clips, entries, strict=True)
            clips = [clip._replace(fields=mix.select(clip.fields, entry.rank)) for clip, entry in pairs]
        return self._layout.pack(entries, clips, fields=self._fields)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_clips": {}, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= {**state, "_lock": threading.Lock()}

    def _get_clip(self, example: int) -> EncodedClip:
        """Return the patches of an example, which are cached until the memory for them is full."""
        if (clip := self._clips.get(example)) is not None:
            return clip
        source, size = self._source, self._source.get_size(example)
        content = read_undamaged(self._layout.names[example], lambda: source.read_example(example))
        is_damaged = content is None
        if content is None:
            zeros = {field.name: np.zeros(field.get_shape(size), field.dtype) for field in source.fields}
            content = np.zeros((*size, source.channels), np.float32), zeros
        latents, arrays = content
        fields = {field.name: field.patchify(arrays[field.name], self._patch) for field in source.fields}
        clip = EncodedClip(np.ascontiguousarray(patchify(latents, self._patch)), fields, is_damaged)
        with self._lock:
            if not is_damaged and clip.nbytes <= self._free_bytes and example not in self._clips:
                self._free_bytes -= clip.nbytes
                self._clips[example] = clip
        return clip


class ClipRow(NamedTuple):
    """A row of clips that are decoded, but not encoded yet."""

    entries: list[RowEntry]
    clips: list[UInt8[np.ndarray, "_ _ _ 3"] | None]
    """Frames of each clip; None for a clip that is damaged."""

    @property
    def undamaged(self) -> list[tuple[RowEntry, UInt8[np.ndarray, "_ _ _ 3"]]]:
        """Return the clips that are encoded, with their entries."""
        pairs = zip(self.entries, self.clips, strict=True)
        return [(entry, clip) for entry, clip in pairs if clip is not None]


class ClipRows:
    """Random access to rows decoded from video files, at training size, from a start drawn in each epoch."""

    def __init__(self, source: ClipSource, layout: RowLayout, limits: SizeLimits, *, seed: int):
        self._source, self._layout, self._limits, self._seed = source, layout, limits, seed

    def __getitem__(self, number: int) -> ClipRow:
        entries = self._layout.get_entries(number)
        return ClipRow(entries, [self._read_frames(entry) for entry in entries])

    def _read_frames(self, entry: RowEntry) -> UInt8[np.ndarray, "T H W 3"] | None:
        info = self._source.infos[entry.example]
        spare = count_sampled_frames(info, self._limits) - fit_size(info, self._limits).t
        start = int(rng.make_generator(self._seed, "start", entry.epoch, entry.example).integers(spare + 1))
        return read_undamaged(
            info.name, lambda: read_fitted_clip(self._source, entry.example, self._limits, start=start).frames
        )


class RowEncoder(NamedTuple):
    """An encoder of rows of decoded clips, all rows of a batch together."""

    encode: Encode
    layout: RowLayout
    patch: Grid
    channels: int
    """Channels of the latents."""
    mask_mix: MaskMix | None = None
    """Draws of the masks of known pixels; None without them."""

    def __call__(self, rows: Sequence[ClipRow]) -> list[PackedBatch]:
        """Return the packed rows."""
        pairs = [pair for row in rows for pair in row.undamaged]
        clips, mix = [clip for _, clip in pairs], self.mask_mix
        latents, fields = self.encode(clips), [dict[str, np.ndarray]() for _ in clips]
        if mix is not None:
            masks = [mix.draw_known(Grid(*clip.shape[:3]), entry.rank) for entry, clip in pairs]
            for values, cond_latents, mask in zip(fields, self.encode(clips, masks), masks, strict=True):
                masked = cond_latents if mask.any() else np.zeros_like(cond_latents)
                for field, array in zip(mix.fields, (masked, fold_mask(mask, mix.stride)), strict=True):
                    values[field.name] = field.patchify(array, self.patch)
        encoded = iter(zip(latents, fields, strict=True))
        return [self._pack(row, encoded) for row in rows]

    def _pack(self, row: ClipRow, encoded: Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]) -> PackedBatch:
        """Pack a row, taking the latents and fields of its clips from the iterator."""
        row_fields = [] if self.mask_mix is None else [field.to_rows(self.patch) for field in self.mask_mix.fields]
        clips = []
        for entry, clip in zip(row.entries, row.clips, strict=True):
            if clip is None:
                tokens = self.layout.get_grid(entry.example).volume
                zeros = {field.name: np.zeros((tokens, *field.shape), np.float32) for field in row_fields}
                empty = np.zeros((tokens, self.patch.volume * self.channels), np.float32)
                clips.append(EncodedClip(empty, zeros, is_damaged=True))
            else:
                latents, fields = next(encoded)
                clips.append(EncodedClip(np.ascontiguousarray(patchify(latents, self.patch)), fields))
        return self.layout.pack(row.entries, clips, fields=row_fields)


def compute_token_grids(source: LatentSource, patch: Grid) -> Int[np.ndarray, "n 3"]:
    """Return the grid of every example, in tokens.

    Raises:
      UserError: If the patch does not divide the latents.
    """
    distinct, first, kinds = find_distinct_grids(np.asarray(source.sizes, np.int32).reshape(-1, 3))
    grids = []
    for size, index in zip(distinct, first.tolist(), strict=True):
        try:
            grids.append(compute_token_grid(size, patch))
        except UserError as error:
            raise UserError(f"{source.names[index]}: {error}") from error
    return np.asarray(grids, np.int32).reshape(-1, 3)[kinds]


def read_caption(captions: CaptionSource, example: int, caption: int, name: str) -> CaptionTokens | None:
    """Return one caption of an example; if its record is damaged, log a warning with its name and return None."""
    return read_undamaged(name, lambda: captions.read(example, caption))


def read_undamaged(name: str, read: Callable[[], T]) -> T | None:
    """Return the result of `read`; if the clip of this name is damaged, log a warning and return None."""
    try:
        return read()
    except DecodeError as error:
        log_damaged_clip(name, error)
        return None


def log_damaged_clip(name: str, error: UserError) -> None:
    """Log a warning that a clip is damaged."""
    logging.getLogger(__name__).warning("%s is damaged and does not count in the loss: %s", name, error)


@functools.lru_cache(maxsize=1024)
def get_positions(grid: Grid, interval: float, lead: float = 0.0) -> Float32[np.ndarray, "n 3"]:
    """Return the positions of a grid's tokens at this spacing and lead along time, from a cache."""
    return compute_positions(grid, step=(interval, 1.0, 1.0), lead=lead)
