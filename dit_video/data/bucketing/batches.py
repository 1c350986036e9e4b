"""Batches of one size each from video files: the alternative to packed rows."""

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
    """How sizes and batches are chosen; see `plan_buckets`.

    Raises:
      UserError: less than one bucket, or a budget that the fixed part of the memory uses up.
    """

    memory: Memory
    budget: float | int
    """bytes of a device"""
    count: int = 8
    """sizes, at most: each is a program to be compiled"""
    most: int | None = None
    """examples of a batch; None for as many as fit"""

    def __post_init__(self):
        if self.count < 1 or self.budget <= self.memory.fixed:
            raise UserError(
                f"buckets need count={self.count} of at least 1, and a budget above the fixed {self.memory.fixed:g} "
                f"bytes, not {self.budget:g}"
            )


class BucketBatches(Batches):
    """An endless iterator over this host's share of the batches. A batch has one clip a row, without padding."""

    def __init__(self, batches: Iterator[Rows], close: Callable[[], None], buckets: Buckets, plan: str):
        super().__init__(batches, close)
        self.hash, self._buckets = plan, buckets

    def summary(self, *, devices: int) -> dict[str, Any]:
        """The buckets, as JSON: what each holds, keeps and shows, and that nothing is dropped."""
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
    """Batches of clips that are resized to cover their bucket's size, cropped to it, and encoded on the way.

    Which part is shown, and when it begins, is a function of (seed, running number). A clip that turns out to be
    damaged keeps its place and does not count.

    Args:
      source: the clips.
      texts: their captions.
      encode: clips to latents.
      buckets: `plan_buckets` of the clips' sizes; its batches are over all hosts, and `reading.batch` is not used.
      latent_grid: the size of a clip's latents.
      channels: of the latents.
      limits: of which the rate counts.
      patch: of the denoiser, in latents.
      text: text tokens that a row has room for.
      reading: which batches.
      intervals: as for `packed_batches`.

    Raises:
      UserError: a caption longer than `text`.
    """
    longest, index = max((max(lengths), -number) for number, lengths in enumerate(texts.lengths))
    if longest > text:
        raise UserError(
            f"{source.infos[-index].name} has {longest} text tokens, a row has room for {text}; "
            "raise the row's text or shorten its caption"
        )
    stream = BucketStream(buckets, seed=reading.seed)
    clips = _Clips(source, stream, limits, reading)

    def batch(clips: list[_Decoded]) -> Rows:
        # Texts are read here, as they need not be picklable: those that decode may be other processes.
        drawn = [_drawn(texts, source.infos, clip, seed=reading.seed) for clip in clips]
        frames = [None if words is None else clip.frames for clip, words in zip(clips, drawn, strict=True)]
        latents = iter(encode([one for one in frames if one is not None]))
        tokens = [None if one is None else patchify(next(latents), patch) for one in frames]
        grid, width = token_grid(latent_grid(clips[0].size), patch), patch.volume * channels
        shape = RowShape(tokens=grid.volume, text=text, segments=1)
        rows = []
        for clip, values, words in zip(clips, tokens, drawn, strict=True):
            item = Item(
                np.zeros((grid.volume, width), np.float32) if values is None else values,
                coordinates(grid, step=(1.0 if intervals is None else intervals[clip.example], 1.0, 1.0)),
                texts.empty if words is None else words,
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
    """A clip at its bucket's size, not encoded yet."""

    size: Grid
    frames: UInt8[np.ndarray, "T H W 3"] | None
    """None where it turned out to be damaged"""
    example: int
    rank: int
    """its running number"""


class _Clips(Pieces):
    """The clips of this host's batches, by step."""

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
        # A copy: the whole frames are not kept.
        return np.ascontiguousarray(frames[:, top : top + size.h, left : left + size.w])


def covering(info: ClipInfo, size: Grid) -> tuple[int, int]:
    """The least height and width of the clip's own shape that cover a size."""
    scale = max(size.h / info.height, size.w / info.width)
    return max(size.h, round(info.height * scale)), max(size.w, round(info.width * scale))


def _drawn(texts: Texts, infos: Sequence[ClipInfo], clip: _Decoded, *, seed: int) -> Text | None:
    """One of the clip's captions; None where it is damaged."""
    caption = rng.host(seed, "caption", clip.rank).integers(len(texts.lengths[clip.example]))
    return read_text(texts, clip.example, int(caption), infos[clip.example].name)
