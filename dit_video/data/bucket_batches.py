"""Loader of batches of one size each from video files, as the alternative to packed rows."""

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import grain
import numpy as np
from jaxtyping import Float, UInt8

from dit_video.core import rng
from dit_video.core.errors import UserError
from dit_video.data.buckets import Buckets, BucketStream
from dit_video.data.captions import CaptionSource
from dit_video.data.clips import ClipInfo, ClipSource
from dit_video.data.loader import DenoiserBatches, LoaderConfig, PieceDecoder, encode_ahead, get_part_range
from dit_video.data.packing.rows import Encode, get_positions, read_caption, read_undamaged
from dit_video.data.sizes import SizeLimits, count_sampled_frames, get_sampled_fps, hash_clips
from dit_video.models.encoders import CaptionTokens
from dit_video.tokens import (
    DenseShape,
    Grid,
    PackedBatch,
    PackedExample,
    compute_token_grid,
    pack,
    patchify,
    stack_rows,
)
from dit_video.video import decode


class BucketBatches(DenoiserBatches):
    """An endless iterator over this host's share of the batches, with one clip per row and no padding."""

    def __init__(self, batches: grain.DatasetIterator, buckets: Buckets, plan_hash: str):
        super().__init__(batches)
        self.hash, self._buckets = plan_hash, buckets

    def summarize(self, *, devices: int) -> dict[str, Any]:
        """Return the buckets as JSON values: their sizes, numbers of examples, and what resizing and cropping keeps."""
        buckets = self._buckets
        return {
            "plan": self.hash,
            "examples": len(buckets.assignment),
            "devices": devices,
            "kept": round(buckets.token_retention, 5),
            "shown": round(buckets.frame_coverage, 5),
            "dropped": 0,
            "buckets": [{**vars(bucket), "size": str(bucket.size)} for bucket in buckets.buckets],
        }

    def __str__(self) -> str:
        return self._buckets.report()


def load_bucket_batches(
    source: ClipSource,
    captions: CaptionSource,
    encode: Encode,
    buckets: Buckets,
    *,
    latent_grid: Callable[[Grid], Grid],
    channels: int,
    limits: SizeLimits,
    patch: Grid,
    max_text: int,
    config: LoaderConfig,
    token_dt: Float[np.ndarray, " n"] | None = None,
) -> BucketBatches:
    """Return batches of clips that are resized to cover their bucket's size, cropped to it, and encoded online.

    The crop in space and time is a function of (seed, running number). A damaged clip keeps its row and does not count.

    Args:
      source: The clips.
      captions: Captions of the same clips.
      encode: Function from clips to their latents.
      buckets: Result of `plan_buckets`; its batches are over all hosts, and `config.batch` is not used.
      latent_grid: Function from a clip's size to its latents' size.
      channels: Channels of the latents.
      limits: Limits of the training sizes; only `fps` is used.
      patch: Patch size of the denoiser, in latents.
      max_text: Text tokens that a row has room for.
      config: Configuration of the loader.
      token_dt: See `load_packed_batches`.

    Raises:
      UserError: If a caption is longer than `max_text`.
    """
    lengths = captions.lengths.longest
    if lengths.max() > max_text:
        raise UserError(
            f"{source.infos[int(np.argmax(lengths))].name} has {lengths.max()} text tokens, but a row has room for "
            f"{max_text}; raise the row's text or shorten its caption"
        )
    stream = BucketStream(buckets, seed=config.seed)
    clips = _BucketDecoder(source, stream, limits, config)

    def batch(clips: list[_DecodedClip]) -> PackedBatch:
        # Captions are read here and not where clips are decoded, as they need not be picklable to worker processes.
        drawn = [_draw_caption(captions, clip, source.infos[clip.example].name, config.seed) for clip in clips]
        frames = [None if caption is None else clip.frames for clip, caption in zip(clips, drawn, strict=True)]
        latents = iter(encode([clip_frames for clip_frames in frames if clip_frames is not None]))
        tokens = [None if clip_frames is None else patchify(next(latents), patch) for clip_frames in frames]
        grid, width = compute_token_grid(latent_grid(clips[0].size), patch), patch.volume * channels
        shape = DenseShape(size=grid, text=max_text)
        rows = []
        for clip, values, caption in zip(clips, tokens, drawn, strict=True):
            item = PackedExample(
                np.zeros((grid.volume, width), np.float32) if values is None else values,
                get_positions(grid, 1.0 if token_dt is None else float(token_dt[clip.example]), config.token_lead),
                captions.empty if caption is None else caption,
                clip.rank,
            )
            row = pack([item], shape, width=width, text_width=captions.width)
            row.valid[0] = values is not None
            rows.append(row)
        return stack_rows(rows)

    plan = hashlib.sha256(repr((stream.hash, hash_clips(source), limits, patch)).encode())
    if token_dt is not None:
        plan.update(token_dt.astype("<f8").tobytes() + repr(config.token_lead).encode())
    for facts in captions.iter_hash_bytes():
        plan.update(facts)
    return BucketBatches(encode_ahead(clips, batch, config), buckets, plan.hexdigest()[:16])


class _DecodedClip(NamedTuple):
    """A clip at the size of its bucket, not encoded yet."""

    size: Grid
    frames: UInt8[np.ndarray, "T H W 3"] | None
    """Frames of the clip; None if it is damaged."""
    example: int
    rank: int
    """Running number of the example in the stream."""


class _BucketDecoder(PieceDecoder):
    """A decoder of the clips of this host's batches."""

    def __init__(self, source: ClipSource, stream: BucketStream, limits: SizeLimits, config: LoaderConfig):
        self._source, self._stream, self._limits, self._config = source, stream, limits, config
        buckets = stream.buckets.buckets
        self.max_pieces = max(bucket.batch for bucket in buckets) // config.hosts
        self.max_bytes = max(3 * bucket.size.volume * bucket.batch for bucket in buckets) / config.hosts

    def decode(self, step: int, part: int, num_parts: int) -> list[_DecodedClip]:
        size, examples, ranks = self._stream.get_batch(step, host=self._config.host, hosts=self._config.hosts)
        chosen = get_part_range(len(examples), part, num_parts)
        pairs = [(int(examples[index]), int(ranks[index])) for index in chosen]
        return [_DecodedClip(size, self._decode_frames(*pair, size), *pair) for pair in pairs]

    def _decode_frames(self, example: int, rank: int, size: Grid) -> UInt8[np.ndarray, "T H W 3"] | None:
        info, generator = self._source.infos[example], rng.make_generator(self._config.seed, "bucket", rank)
        fps = get_sampled_fps(info, self._limits)
        start = int(generator.integers(count_sampled_frames(info, self._limits) - size.t + 1))
        height, width = compute_covering_size(info, size)
        top, left = (int(generator.integers(spare + 1)) for spare in (height - size.h, width - size.w))
        covering = Grid(size.t, height, width)
        clip = read_undamaged(
            info.name, lambda: decode(self._source[example], size=covering, start=start / fps, fps=fps)
        )
        # Copy the crop, so that the memory of the whole frames is freed.
        crop = slice(None), slice(top, top + size.h), slice(left, left + size.w)
        return None if clip is None else np.ascontiguousarray(clip.frames[crop])


def compute_covering_size(info: ClipInfo, size: Grid) -> tuple[int, int]:
    """Return the smallest height and width of the clip's own aspect ratio that cover a size."""
    scale = max(size.h / info.height, size.w / info.width)
    return max(size.h, round(info.height * scale)), max(size.w, round(info.width * scale))


def _draw_caption(captions: CaptionSource, clip: _DecodedClip, name: str, seed: int) -> CaptionTokens | None:
    """Read a random caption of the clip; None if its record is damaged."""
    caption = captions.lengths.draw(clip.example, lambda: rng.make_generator(seed, "caption", clip.rank))
    return read_caption(captions, clip.example, caption, name)
