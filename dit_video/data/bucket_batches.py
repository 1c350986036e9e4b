"""Batches of one size each from video files: the alternative to packed rows."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import grain
import numpy as np
from jaxtyping import Int32, UInt8, UInt32

from dit_video import rng
from dit_video.data.buckets import Buckets, BucketStream, Memory
from dit_video.data.loader import Batches, Reading, encoded_ahead, read_ahead
from dit_video.data.prefetch import ENDLESS
from dit_video.data.rows import Encode, Tokenize, set_aside, tokenized_captions
from dit_video.data.sizes import SizeLimits, sampled_fps, sampled_frames
from dit_video.data.source import ClipInfo, ClipSource
from dit_video.errors import DecodeError, UserError
from dit_video.tokens import Grid, Rows, coordinates, patchify, token_grid
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
    tokenize: Tokenize,
    encode: Encode,
    buckets: Buckets,
    *,
    latent_grid: Callable[[Grid], Grid],
    channels: int,
    limits: SizeLimits,
    patch: Grid,
    text: int,
    reading: Reading,
) -> BucketBatches:
    """Batches of clips that are resized to cover their bucket's size, cropped to it, and encoded on the way.

    Which part is shown, and when it begins, is a function of (seed, running number). A clip that turns out to be
    damaged keeps its place and does not count.

    Args:
      source: the clips.
      tokenize: caption to text tokens.
      encode: clips to latents.
      buckets: `plan_buckets` of the clips' sizes; its batches are over all hosts, and `reading.batch` is not used.
      latent_grid: the size of a clip's latents.
      channels: of the latents.
      limits: of which the rate counts.
      patch: of the denoiser, in latents.
      text: text tokens that a row has room for.
      reading: which batches.

    Raises:
      UserError: a caption longer than `text`.
    """
    texts = tokenized_captions([info.captions for info in source.infos], tokenize)
    longest, index = max((max(map(len, each)), -number) for number, each in enumerate(texts))
    if longest > text:
        raise UserError(
            f"{source.infos[-index].name} has {longest} text tokens, a row has room for {text}; "
            "raise the row's text or shorten its caption"
        )
    stream = BucketStream(buckets, seed=reading.seed)
    every = _DecodedBatches(source, stream, texts, limits, reading)
    decoded = read_ahead(grain.MapDataset.source(every)[reading.start_step :], reading)

    def batch(one: _Decoded) -> Rows:
        latents = encode([clip for clip in one.clips if clip is not None])
        return _rows(one, latents, token_grid(latent_grid(one.size), patch), patch, channels, text)

    facts = (stream.hash, source.infos, limits, patch)
    plan = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
    return BucketBatches(*encoded_ahead(decoded, batch), buckets, plan)


class _Decoded(NamedTuple):
    """A batch of clips of one size that are not encoded yet."""

    size: Grid
    clips: list[UInt8[np.ndarray, "T H W 3"] | None]
    texts: list[Int32[np.ndarray, " s"]]
    ranks: UInt32[np.ndarray, " b"]


class _DecodedBatches:
    """By step, as Grain reads them."""

    def __init__(
        self,
        source: ClipSource,
        stream: BucketStream,
        texts: Sequence[tuple[np.ndarray, ...]],
        limits: SizeLimits,
        reading: Reading,
    ):
        self._source, self._stream, self._texts, self._limits, self._reading = source, stream, texts, limits, reading

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, step: int) -> _Decoded:
        size, examples, ranks = self._stream.batch(step, host=self._reading.host, hosts=self._reading.hosts)
        pairs = list(zip(examples.tolist(), ranks.tolist(), strict=True))
        return _Decoded(
            size,
            [self._clip(example, rank, size) for example, rank in pairs],
            [self._text(example, rank) for example, rank in pairs],
            ranks,
        )

    def _clip(self, example: int, rank: int, size: Grid) -> UInt8[np.ndarray, "T H W 3"] | None:
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
        return frames[:, top : top + size.h, left : left + size.w]

    def _text(self, example: int, rank: int) -> Int32[np.ndarray, " s"]:
        texts = self._texts[example]
        return texts[rng.host(self._reading.seed, "caption", rank).integers(len(texts))]


def covering(info: ClipInfo, size: Grid) -> tuple[int, int]:
    """The least height and width of the clip's own shape that cover a size."""
    scale = max(size.h / info.height, size.w / info.width)
    return max(size.h, round(info.height * scale)), max(size.w, round(info.width * scale))


def _rows(one: _Decoded, latents: list[np.ndarray], grid: Grid, patch: Grid, channels: int, room: int) -> Rows:
    """One clip a row; `latents` are those of the clips that could be read, `grid` is in tokens."""
    number = len(one.clips)
    valid = np.asarray([clip is not None for clip in one.clips])
    tokens = np.zeros((number, grid.volume, patch.volume * channels), np.float32)
    for index, values in zip(np.flatnonzero(valid), latents, strict=True):
        tokens[index] = patchify(values, patch)
    text, text_segments = np.zeros((2, number, room), np.int32)
    for row, values in enumerate(one.texts):
        text[row, : len(values)], text_segments[row, : len(values)] = values, 1
    return Rows(
        tokens=tokens,
        segments=np.ones((number, grid.volume), np.int32),
        coordinates=np.repeat(coordinates(grid)[None], number, axis=0),
        text=text,
        text_segments=text_segments,
        examples=one.ranks[:, None],
        valid=valid[:, None],
    )
