"""The two sources of examples: cached latents, and clips that are decoded and encoded as they are read."""

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int, UInt8

from dit_video.core.errors import UserError
from dit_video.core.grid import find_distinct_grids, map_grids
from dit_video.core.storage import is_remote
from dit_video.data.clip_fields import compute_clip_fields
from dit_video.data.clips import ClipInfo, ClipSource
from dit_video.data.damage import read_undamaged
from dit_video.data.examples import Entry, ExampleTable
from dit_video.data.latents.cache import LatentSource
from dit_video.data.packing.mask_mix import MaskMix
from dit_video.data.prefetch import DECODE_THREADS
from dit_video.data.sizes import (
    SizeLimits,
    count_sampled_frames,
    fit_size,
    fit_sizes,
    get_sampled_fps,
    read_fitted_clip,
)
from dit_video.models.autoencoders import latent_grid
from dit_video.models.conditioning import ClipConditioning, FrameCrop, IsKnown, fold_mask
from dit_video.tokens import Grid, PackedExample, compute_token_grid, patchify
from dit_video.video import decode

CACHE_BYTES = 1 << 30
REMOTE_THREADS = 16
"""Number of batches of latents that are read from a bucket at once, as each request waits for the network."""


class _Patches(NamedTuple):
    """The latents of an example as patches; those of a damaged one are zero."""

    tokens: Float32[np.ndarray, "n p"] | None
    """None for an example that is damaged."""
    fields: Mapping[str, np.ndarray]

    @property
    def nbytes(self) -> int:
        arrays = (*self.fields.values(), *(() if self.tokens is None else (self.tokens,)))
        return sum(values.nbytes for values in arrays)


class LatentExamples:
    """Examples of cached latents, which are read with their captions, and need no encoding.

    Args:
      latents: The latents.
      table: The same examples.
      patch: Patch size of the denoiser, in latents.
      mask_mix: Draws of the masks of known pixels, whose kinds are all cached; None without them.
      cache_bytes: Memory for cached patches, in each process that reads.
    """

    def __init__(
        self,
        latents: LatentSource,
        table: ExampleTable,
        *,
        patch: Grid,
        mask_mix: MaskMix | None = None,
        cache_bytes: int = CACHE_BYTES,
    ):
        self.table, self._latents, self._patch, self._mask_mix = table, latents, patch, mask_mix
        self._free_bytes = cache_bytes
        self.width = patch.volume * latents.channels
        fields = latents.fields
        if mask_mix is not None:
            cached = {field for pair in mask_mix.list_cached_fields() for field in pair}
            fields = (*(field for field in fields if field not in cached), *mask_mix.fields)
        self.fields = tuple(field.to_rows(patch) for field in fields)
        self.threads = REMOTE_THREADS if is_remote(latents.folder) else 1
        per_token = (math.prod(field.shape) for field in self.fields if field.alignment in ("frame", "grid"))
        self.token_bytes = 4.0 * (self.width + sum(per_token))
        self._patches: dict[int, _Patches] = {}
        self._lock = threading.Lock()

    def read(self, entry: Entry) -> PackedExample:
        """Return an example with its caption."""
        tokens, fields = self._get_patches(entry.example)
        if self._mask_mix is not None:
            fields = self._mask_mix.select(fields, entry.rank)
        return self.table.make_example(entry, tokens, fields, self.width)

    def encode(self, batch: Sequence[tuple[Entry, PackedExample]]) -> list[PackedExample]:
        """Return the examples as they are."""
        return [example for _, example in batch]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_patches": {}, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= {**state, "_lock": threading.Lock()}

    def _get_patches(self, example: int) -> _Patches:
        """Return the patches of an example, which are cached until the memory for them is full."""
        if (cached := self._patches.get(example)) is not None:
            return cached
        latents = self._latents
        content = read_undamaged(self.table.names[example], lambda: latents.read_example(example))
        if content is None:
            size = latents.get_size(example)
            arrays = {field.name: np.zeros(field.get_shape(size), field.dtype) for field in latents.fields}
        else:
            arrays = content[1]
        fields = {field.name: field.patchify(arrays[field.name], self._patch) for field in latents.fields}
        tokens = None if content is None else np.ascontiguousarray(patchify(content[0], self._patch))
        patches = _Patches(tokens, fields)
        with self._lock:
            if content is not None and patches.nbytes <= self._free_bytes and example not in self._patches:
                self._free_bytes -= patches.nbytes
                self._patches[example] = patches
        return patches


@runtime_checkable
class Encode(Protocol):
    """A function from clips of any sizes to their latents."""

    def __call__(
        self, clips: Sequence[UInt8[np.ndarray, "_ _ _ 3"]], masks: Sequence[IsKnown] | None = None, /
    ) -> list[Float32[np.ndarray, "_ _ _ c"]]:
        """Return the latents of clips, or of the clips with all but the known pixels grey."""


class DecodedClip(NamedTuple):
    """A clip at its size in the rows, not encoded yet."""

    frames: UInt8[np.ndarray, "T H W 3"]
    start: int
    """Number of the clip's frames, at the training rate, that precede the first frame here."""
    crop: FrameCrop | None = None


@dataclass(frozen=True, kw_only=True)
class OnlineEncoding:
    """The encoding of clips as they are read."""

    encode: Encode
    """Function from clips to their latents, e.g. on the device."""
    limits: SizeLimits
    """Limits of the training sizes."""
    stride: Grid
    """Pixels of a latent along (t, h, w)."""
    channels: int
    """Channels of the latents."""
    patch: Grid
    """Patch size of the denoiser, in latents."""
    mask_mix: MaskMix | None = None
    """Draws of the masks of known pixels, with which every clip is encoded once more; None without them."""
    conditioning: tuple[ClipConditioning, ...] = ()
    """Conditioning by fields of the clips."""


class ClipExamples:
    """Examples of clips that are decoded by threads or workers, and encoded in the process that has the devices.

    A clip has its training size, from a start that is drawn for every use; in a bucket it is resized to cover the
    bucket's size, and cropped to it.

    Args:
      clips: The clips.
      table: The same clips.
      encoding: Their encoding.
    """

    def __init__(self, clips: ClipSource, table: ExampleTable, encoding: OnlineEncoding):
        self.table, self._clips, self._limits, self._encoding = table, clips, encoding.limits, encoding
        patch, mix = encoding.patch, encoding.mask_mix
        self.width, self.threads = patch.volume * encoding.channels, DECODE_THREADS
        self.token_bytes = 3.0 * encoding.stride.volume * patch.volume
        self._clip_fields = (*(() if mix is None else mix.fields), *(each.field for each in encoding.conditioning))
        self.fields = tuple(field.to_rows(patch) for field in self._clip_fields)

    def read(self, entry: Entry) -> DecodedClip | None:
        """Return the frames of a clip; None for a damaged one."""
        info = self._clips.infos[entry.example]
        read = self._read_fitted if entry.crop is None else self._read_cropped
        return read_undamaged(info.name, lambda: read(info, entry))

    def encode(self, batch: Sequence[tuple[Entry, DecodedClip | None]]) -> list[PackedExample]:
        """Encode the clips that are not damaged all together, and read their captions."""
        readable = [(entry, clip) for entry, clip in batch if clip is not None]
        all_latents, patch = self._encoding.encode([clip.frames for _, clip in readable]), self._encoding.patch
        encoded = iter(zip(all_latents, self._compute_fields(readable), strict=True))
        examples = []
        for entry, clip in batch:
            if clip is None:
                tokens, size = None, self._get_latent_size(entry)
                fields = {field.name: np.zeros(field.get_shape(size), field.dtype) for field in self._clip_fields}
            else:
                latents, fields = next(encoded)
                tokens = np.ascontiguousarray(patchify(latents, patch))
            fields = {field.name: field.patchify(fields[field.name], patch) for field in self._clip_fields}
            examples.append(self.table.make_example(entry, tokens, fields, self.width))
        return examples

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_encoding": None}  # workers only read: an encoder on a device can't go there

    def _read_fitted(self, info: ClipInfo, entry: Entry) -> DecodedClip:
        spare = count_sampled_frames(info, self._limits) - fit_size(info, self._limits).t
        start = int(entry.make_generator("start").integers(spare + 1))
        return DecodedClip(read_fitted_clip(self._clips, entry.example, self._limits, start=start).frames, start)

    def _read_cropped(self, info: ClipInfo, entry: Entry) -> DecodedClip:
        generator, fps, size = entry.make_generator("bucket"), get_sampled_fps(info, self._limits), entry.crop
        assert size is not None
        start = int(generator.integers(count_sampled_frames(info, self._limits) - size.t + 1))
        height, width = compute_covering_size(info, size)
        top, left = (int(generator.integers(spare + 1)) for spare in (height - size.h, width - size.w))
        clip = decode(
            self._clips[entry.example],
            size=Grid(size.t, height, width),
            start=start / fps,
            fps=fps,
            background=self._clips.get_background(entry.example, start),
        )
        # Copy the crop, so that the memory of the whole frames is freed.
        frames = clip.frames[:, top : top + size.h, left : left + size.w]
        return DecodedClip(np.ascontiguousarray(frames), start, FrameCrop(height, width, top, left))

    def _compute_fields(self, clips: Sequence[tuple[Entry, DecodedClip]]) -> list[dict[str, np.ndarray]]:
        """Return the fields of each clip by name."""
        encoding, frames = self._encoding, [clip.frames for _, clip in clips]
        fields = [dict[str, np.ndarray]() for _ in clips]
        if (mix := encoding.mask_mix) is not None:
            masks = [mix.draw_known(Grid(*clip.frames.shape[:3]), entry.rank) for entry, clip in clips]
            for values, cond_latents, mask in zip(fields, encoding.encode(frames, masks), masks, strict=True):
                arrays = cond_latents if mask.any() else np.zeros_like(cond_latents), fold_mask(mask, mix.stride)
                values |= {field.name: array for field, array in zip(mix.fields, arrays, strict=True)}
        counts = {count for each in encoding.conditioning for count in each.encoded_prefixes}
        prefixes = {count: encoding.encode(frames, [_know_first(each, count) for each in frames]) for count in counts}
        for index, (values, (entry, clip)) in enumerate(zip(fields, clips, strict=True)):
            values |= compute_clip_fields(
                encoding.conditioning,
                self._clips,
                entry.example,
                encoding.limits,
                frames=clip.frames,
                stride=encoding.stride,
                start=clip.start,
                crop=clip.crop,
                encoded={count: latents[index] for count, latents in prefixes.items()},
            )
        return fields

    def _get_latent_size(self, entry: Entry) -> Grid:
        return Grid(*(count * side for count, side in zip(entry.grid, self._encoding.patch, strict=True)))


def _know_first(frames: UInt8[np.ndarray, "T H W 3"], count: int) -> IsKnown:
    mask = np.zeros(frames.shape[:3], bool)
    mask[:count] = True
    return mask


def compute_covering_size(info: ClipInfo, size: Grid) -> tuple[int, int]:
    """Return the smallest height and width of the clip's own aspect ratio that cover a size."""
    scale = max(size.h / info.height, size.w / info.width)
    return max(size.h, round(info.height * scale)), max(size.w, round(info.width * scale))


def compute_latent_grids(latents: LatentSource, patch: Grid) -> Int[np.ndarray, "n 3"]:
    """Return the grid of every example, in tokens.

    Raises:
      UserError: If the patch does not divide the latents.
    """
    distinct, first, kinds = find_distinct_grids(np.asarray(latents.sizes, np.int32).reshape(-1, 3))
    grids = []
    for size, index in zip(distinct, first.tolist(), strict=True):
        try:
            grids.append(compute_token_grid(size, patch))
        except UserError as error:
            raise UserError(f"{latents.names[index]}: {error}") from error
    return np.asarray(grids, np.int32).reshape(-1, 3)[kinds]


def compute_clip_grids(clips: ClipSource, limits: SizeLimits, *, stride: Grid, patch: Grid) -> Int[np.ndarray, "n 3"]:
    """Return the grid of every clip at its training size, in tokens.

    Raises:
      UserError: If a clip has no size within the limits, or the patch does not divide its latents.
    """
    return map_grids(lambda size: compute_token_grid(latent_grid(size, stride), patch), fit_sizes(clips, limits))
