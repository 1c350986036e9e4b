"""Loader of batches of one size each from video files, as the alternative to packed rows."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from dit_video.core import rng
from dit_video.core.errors import DecodeError, UserError
from dit_video.data.bucketing.buckets import Buckets, BucketStream, Memory
from dit_video.data.captions import Text, Texts
from dit_video.data.clips import ClipInfo, ClipSource
from dit_video.data.loader import Batches, Pieces, Reading, encoded_ahead, of_part
from dit_video.data.packing.rows import Encode, read_text, set_aside
from dit_video.data.sizes import SizeLimits, sampled_fps, sampled_frames
from dit_video.tokens import Grid, Item, Rows, RowShape, coordinates, pack, patchify, token_grid
from dit_video.video import decode


@dataclass(frozen=True, kw_only=True)
class BucketConfig:
    """Configuration of the choice of sizes and batches, see `plan_buckets`.

    Raises:
      UserError: there is no bucket, or the budget does not exceed the fixed part of the memory.
    """

    memory: Memory
    budget: float | int
    """Memory of a device, in bytes."""
    count: int = 8
    """Maximum number of buckets: a program is compiled for each."""
    most: int | None = None
    """Maximum number of examples per batch; None for as many as fit."""

    def __post_init__(self):
        if self.count < 1 or self.budget <= self.memory.fixed:
            raise UserError(
                f"count={self.count}, budget={self.budget:g} is invalid: count must be at least 1, and the budget "
                f"above the fixed {self.memory.fixed:g} bytes"
            )


class BucketBatches(Batches):
    """An endless iterator over this host's share of the batches, with one clip per row and no padding."""

    def __init__(self, batches: Iterator[Rows], close: Callable[[], None], buckets: Buckets, plan: str):
        super().__init__(batches, close)
        self.hash, self._buckets = plan, buckets

    def summary(self, *, devices: int) -> dict[str, Any]:
        """Return the buckets as JSON values: their sizes, numbers of examples, and what resizing and cropping keeps."""
        buckets = self._buckets
        return {
            "plan": self.hash,
            "examples": len(buckets.of),
            "devices": devices,
            "kept": round(buckets.kept, 5),
            "shown": round(buckets.shown, 5),
            "dropped": 0,
            "buckets": [{**vars(bucket), "size": "x".join(map(str, bucket.size))} for bucket in buckets.buckets],
        }

    def __str__(self) -> str:
        return self._buckets.report()


def bucket_batches(
    source: ClipSource,
    texts: Texts,
    encode: Encode,
    buckets: Buckets,
    *,
    latent_grid: Callable[[Grid], Grid],
    channels: int,
    limits: SizeLimits,
    patch: Grid,
    text: int,
    reading: Reading,
    intervals: Sequence[float] | None = None,
) -> BucketBatches:
    """Return batches of clips that are resized to cover their bucket's size, cropped to it, and encoded online.

    The crop in space and time is a function of (seed, running number). A damaged clip keeps its row and does not count.

    Args:
      source: the clips.
      captions: captions of the same clips.
      encode: function from clips to their latents.
      buckets: result of `plan_buckets`; its batches are over all hosts, and `config.batch` is not used.
      latent_grid: function from the size of a clip to that of its latents.
      channels: channels of the latents.
      limits: limits of the training sizes, of which only `fps` is used.
      patch: patch size of the denoiser, in latents.
      max_text: text tokens that a row has room for.
      config: configuration of the loader.
      token_dt: see `load_packed_batches`.

    Raises:
      UserError: a caption is longer than `max_text`.
    """
    longest, index = max((max(lengths), -number) for number, lengths in enumerate(texts.lengths))
    if longest > text:
        raise UserError(
            f"{source.infos[-index].name} has {longest} text tokens, but a row has room for {text}; "
            "raise the row's text or shorten its caption"
        )
    stream = BucketStream(buckets, seed=reading.seed)
    clips = _Clips(source, stream, limits, reading)

    def batch(clips: list[_Decoded]) -> Rows:
        # Captions are read here and not where clips are decoded, as they need not be picklable to worker processes.
        drawn = [_drawn(texts, source.infos, clip, seed=reading.seed) for clip in clips]
        frames = [None if caption is None else clip.frames for clip, caption in zip(clips, drawn, strict=True)]
        latents = iter(encode([clip_frames for clip_frames in frames if clip_frames is not None]))
        tokens = [None if clip_frames is None else patchify(next(latents), patch) for clip_frames in frames]
        grid, width = token_grid(latent_grid(clips[0].size), patch), patch.volume * channels
        shape = RowShape(tokens=grid.volume, text=text, segments=1)
        rows = []
        for clip, values, caption in zip(clips, tokens, drawn, strict=True):
            item = Item(
                np.zeros((grid.volume, width), np.float32) if values is None else values,
                coordinates(grid, step=(1.0 if intervals is None else intervals[clip.example], 1.0, 1.0)),
                texts.empty if caption is None else caption,
                clip.rank,
            )
            row = pack([item], shape, width=width, text_width=texts.width)
            row.valid[0] = values is not None
            rows.append(row)
        return Rows(*map(np.stack, zip(*rows, strict=True)))

    plan = hashlib.sha256(repr((stream.hash, source.infos, limits, patch)).encode())
    if intervals is not None:
        plan.update(repr(tuple(intervals)).encode())
    for facts in texts.facts():
        plan.update(facts)
    return BucketBatches(*encoded_ahead(clips, batch, reading), buckets, plan.hexdigest()[:16])


class _Decoded(NamedTuple):
    """A clip at the size of its bucket, not encoded yet."""

    size: Grid
    frames: UInt8[np.ndarray, "T H W 3"] | None
    """Frames of the clip; None if it is damaged."""
    example: int
    rank: int
    """Running number of the example in the stream."""


class _Clips(Pieces):
    """A decoder of the clips of this host's batches."""

    def __init__(self, source: ClipSource, stream: BucketStream, limits: SizeLimits, reading: Reading):
        self._source, self._stream, self._limits, self._reading = source, stream, limits, reading
        buckets = stream.buckets.buckets
        self.most = max(bucket.batch for bucket in buckets) // reading.hosts
        self.most_bytes = max(3 * bucket.size.volume * bucket.batch for bucket in buckets) / reading.hosts

    def decoded(self, step: int, part: int, parts: int) -> list[_Decoded]:
        size, examples, ranks = self._stream.batch(step, host=self._reading.host, hosts=self._reading.hosts)
        chosen = of_part(len(examples), part, parts)
        pairs = [(int(examples[index]), int(ranks[index])) for index in chosen]
        return [_Decoded(size, self._frames(*pair, size), *pair) for pair in pairs]

    def _frames(self, example: int, rank: int, size: Grid) -> UInt8[np.ndarray, "T H W 3"] | None:
        info, generator = self._source.infos[example], rng.host(self._reading.seed, "bucket", rank)
        fps = sampled_fps(info, self._limits)
        start = int(generator.integers(sampled_frames(info, self._limits) - size.t + 1))
        height, width = covering(info, size)
        top, left = (int(generator.integers(spare + 1)) for spare in (height - size.h, width - size.w))
        try:
            frames = decode(
                self._source[example], size=Grid(size.t, height, width), start=info.start + start / fps, fps=fps
            ).frames
        except DecodeError as error:
            set_aside(info.name, error)
            return None
        # Copy the crop, so that the memory of the whole frames is freed.
        return np.ascontiguousarray(frames[:, top : top + size.h, left : left + size.w])


def covering(info: ClipInfo, size: Grid) -> tuple[int, int]:
    """Return the smallest height and width of the clip's own aspect ratio that cover a size."""
    scale = max(size.h / info.height, size.w / info.width)
    return max(size.h, round(info.height * scale)), max(size.w, round(info.width * scale))


def _drawn(texts: Texts, infos: Sequence[ClipInfo], clip: _Decoded, *, seed: int) -> Text | None:
    """Read a random caption of the clip; None if its record is damaged."""
    caption = rng.host(seed, "caption", clip.rank).integers(len(texts.lengths[clip.example]))
    return read_text(texts, clip.example, int(caption), infos[clip.example].name)
