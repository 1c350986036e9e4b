"""Batches of one size each from video files: the alternative to packed rows."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32, UInt8

from dit_video import rng
from dit_video.data.buckets import Buckets, BucketStream, Memory
from dit_video.data.loader import Batches, Pieces, Reading, encoded_ahead, of_part
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
    clips = _Clips(source, stream, texts, limits, reading)

    def batch(clips: list[_Decoded]) -> Rows:
        latents = encode([clip.frames for clip in clips if clip.frames is not None])
        return _rows(clips, latents, token_grid(latent_grid(clips[0].size), patch), patch, channels, text)

    facts = (stream.hash, source.infos, limits, patch)
    plan = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
    return BucketBatches(*encoded_ahead(clips, batch, reading), buckets, plan)


class _Decoded(NamedTuple):
    """A clip at its bucket's size, not encoded yet."""

    size: Grid
    frames: UInt8[np.ndarray, "T H W 3"] | None
    """None where it turned out to be damaged"""
    text: Int32[np.ndarray, " s"]
    rank: np.uint32


class _Clips(Pieces):
    """The clips of this host's batches, by step."""

    def __init__(
        self,
        source: ClipSource,
        stream: BucketStream,
        texts: Sequence[tuple[np.ndarray, ...]],
        limits: SizeLimits,
        reading: Reading,
    ):
        self._source, self._stream, self._texts, self._limits, self._reading = source, stream, texts, limits, reading
        buckets = stream.buckets.buckets
        self.most = max(bucket.batch for bucket in buckets) // reading.hosts
        self.most_bytes = max(3 * bucket.size.volume * bucket.batch for bucket in buckets) / reading.hosts

    def decoded(self, step: int, part: int, parts: int) -> list[_Decoded]:
        size, examples, ranks = self._stream.batch(step, host=self._reading.host, hosts=self._reading.hosts)
        chosen = of_part(len(examples), part, parts)
        return [self._decoded(int(examples[index]), ranks[index], size) for index in chosen]

    def _decoded(self, example: int, rank: np.uint32, size: Grid) -> _Decoded:
        return _Decoded(size, self._frames(example, int(rank), size), self._text(example, int(rank)), rank)

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

    def _text(self, example: int, rank: int) -> Int32[np.ndarray, " s"]:
        texts = self._texts[example]
        return texts[rng.host(self._reading.seed, "caption", rank).integers(len(texts))]


def covering(info: ClipInfo, size: Grid) -> tuple[int, int]:
    """The least height and width of the clip's own shape that cover a size."""
    scale = max(size.h / info.height, size.w / info.width)
    return max(size.h, round(info.height * scale)), max(size.w, round(info.width * scale))


def _rows(
    clips: Sequence[_Decoded], latents: list[np.ndarray], grid: Grid, patch: Grid, channels: int, room: int
) -> Rows:
    """One clip a row; `latents` are those of the clips that could be read, `grid` is in tokens."""
    number = len(clips)
    valid = np.asarray([clip.frames is not None for clip in clips])
    tokens = np.zeros((number, grid.volume, patch.volume * channels), np.float32)
    for index, values in zip(np.flatnonzero(valid), latents, strict=True):
        tokens[index] = patchify(values, patch)
    text, text_segments = np.zeros((2, number, room), np.int32)
    for row, clip in enumerate(clips):
        text[row, : len(clip.text)], text_segments[row, : len(clip.text)] = clip.text, 1
    return Rows(
        tokens=tokens,
        segments=np.ones((number, grid.volume), np.int32),
        coordinates=np.repeat(coordinates(grid)[None], number, axis=0),
        text=text,
        text_segments=text_segments,
        examples=np.asarray([[clip.rank] for clip in clips], np.uint32),
        valid=valid[:, None],
    )
