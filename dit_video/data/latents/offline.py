"""Encoding of clips as latents for the denoiser's training: selection of views, and the autoencoder over them.

Clips of all sizes share canvases of at most eight sizes, so that as many programs are compiled. The files of a data set
are written one by one, by any number of processes; a file that exists is not written again.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float32, Int32, UInt8

from dit_video.core import pixels
from dit_video.core.errors import DecodeError, UserError
from dit_video.core.storage import StoragePathLike, to_storage_path
from dit_video.data.clip_fields import compute_clip_fields
from dit_video.data.clips import ClipSource
from dit_video.data.latents.cache import Identity, LatentExample, Skipped
from dit_video.data.latents.online import CanvasEncoder
from dit_video.data.latents.plan import (
    Encoding,
    EncodingPlan,
    View,
    draw_view_masks,
    hash_inputs,
    list_views,
    make_mask_values,
    place_masks,
)
from dit_video.data.latents.writer import LatentWriter
from dit_video.data.sizes import read_fitted_clip
from dit_video.data.tables import compute_row_id
from dit_video.distributed.faults.progress import count_progress, expect_progress
from dit_video.models.autoencoders import ClipCanvas, compute_segment_ids, latent_grid
from dit_video.models.conditioning import COND_LATENTS, IMAGE_TOKENS, IsKnown
from dit_video.tokens import Grid


class _EncodedBatch(NamedTuple):
    """Canvases with their latents, which the devices may still compute."""

    canvases: Sequence[ClipCanvas]
    latents: Array
    prefixes: dict[int, Array]
    """Latents of the canvases with only so many first frames kept; see `Encoding.list_prefixes`."""
    cond_latents: list[Array]
    """Latents of the canvases with all but the known pixels grey, for each kind of mask."""
    masks: list[dict[int, IsKnown]]
    """Masks of the views, for each kind."""
    frames: dict[int, UInt8[np.ndarray, "_ _ _ 3"] | Skipped]
    """Frames of each view."""


def encode_latents(
    destination: StoragePathLike,
    clips: ClipSource,
    encoding: Encoding,
    plan: EncodingPlan,
    *,
    identity: Identity,
    shard: int = 0,
    shards: int = 1,
    progress: Callable[[int], None] = lambda done: None,
) -> bool:
    """Write this process's share of the missing files, and the index once all files exist; returns True if they do.

    Args:
      destination: The folder, or an address (`gs://…`); see `core.storage`.
      clips, encoding, plan: Clips, encoders and settings, and their `plan_encoding`.
      identity: Identity of the autoencoder and of all else that the latents depend on; training asks for it again.
      shard: Number of this process among `shards`, which writes the files `shard`, `shard + shards`, …
      progress: Called with the number of finished views in this process's files.

    Raises:
      UserError: If the destination holds other latents, the identity lacks that of a used encoder, or there is no such
        shard.
    """
    if not 0 <= shard < shards:
        raise UserError(f"shard={shard} must be one of 0 to {shards - 1}")
    for part, function in (("text", encoding.encode_text), ("image", encoding.encode_image)):
        if function is not None and (isinstance(identity, str) or part not in identity):
            raise UserError(f"identity lacks the part {part}, which is encoded. Add that of the {part} encoder.")
    files = _make_writer(destination, encoding, plan, identity)
    encoder = _Encoder(clips, encoding, plan)
    done = 0
    with expect_progress():
        for number in range(shard, len(plan.files), shards):
            if not files.has_file(number):

                def counted_examples(number: int = number, before: int = done) -> Iterator[LatentExample | Skipped]:
                    for count, example in enumerate(encoder.examples(plan.files[number]), before + 1):
                        yield example
                        count_progress()
                        progress(count)

                files.write(number, counted_examples(), encoder.embed(number))
            done += plan.count_views(number)
            count_progress()
            progress(done)
    return finish_latents(destination, clips, encoding, plan, identity=identity)


def finish_latents(
    destination: StoragePathLike, clips: ClipSource, encoding: Encoding, plan: EncodingPlan, *, identity: Identity
) -> bool:
    """Write the table if all files exist; returns True if they do."""
    views = list_views(clips.infos, encoding.limits, encoding.augmentations)
    captions, inputs = clips.column("captions"), hash_inputs(clips, encoding.columns)
    current = {compute_row_id(view.name, inputs[view.clip]): captions[view.clip] for view in views}
    return _make_writer(destination, encoding, plan, identity).finish(captions=current.get)


def _make_writer(folder: StoragePathLike, encoding: Encoding, plan: EncodingPlan, identity: Identity) -> LatentWriter:
    folder, count = to_storage_path(folder), len(plan.files)
    options: dict[str, Any] = {"num_files": count, "plan_hash": plan.hash, "dtype": encoding.storage}
    return LatentWriter(folder=folder, identity=identity, fields=encoding.make_fields(), **options)


class _Encoder:  # encodes canvases on all devices of this process while threads decode the next ones
    def __init__(self, clips: ClipSource, encoding: Encoding, plan: EncodingPlan):
        self._clips, self._encoding, self._plan = clips, encoding, plan
        self._inputs = hash_inputs(clips, encoding.columns)
        opened = encoding.open_conditioning
        self._conditioning = encoding.conditioning if opened is None else opened()
        self._sizes = [view.size for view in plan.views]
        self._encode = CanvasEncoder(encoding.autoencoder, encoding.params, canvas_pixels=encoding.canvas_pixels)
        self._count = {size: len(list(same)) for size, same in itertools.groupby(plan.canvases, lambda one: one.size)}

    def embed(self, file: int) -> Iterator[tuple[str, Float32[np.ndarray, "s e"]]]:
        """Yield the captions of a file, and their embeddings."""
        if self._encoding.encode_text is not None:
            for caption in self._plan.captions[file]:
                yield caption, self._encoding.encode_text(caption)
                count_progress()

    def examples(self, canvases: Sequence[int]) -> Iterator[LatentExample | Skipped]:
        if not canvases:
            return
        # Read one clip here, so that a data set that cannot be opened raises instead of skipping each of its clips.
        with contextlib.suppress(DecodeError):
            self._clips[self._plan.views[self._plan.canvases[canvases[0]].slots[0].clip].clip]
        batches = list(self._make_batches(canvases))
        pool = ThreadPoolExecutor(self._encoding.threads, thread_name_prefix="decode")
        try:
            decoded, computed = self._submit_decoding(pool, batches[0]), None
            for number, batch in enumerate(batches):
                current = decoded
                decoded = self._submit_decoding(pool, batches[number + 1]) if number + 1 < len(batches) else {}
                arrays, frames = self._draw_canvases(batch, current)
                prefixes = {
                    kept: self._encode(*arrays, _keep_first_frames(arrays[0], kept))
                    for kept in self._encoding.list_prefixes()
                }
                masks = draw_view_masks(self._encoding.masks, batch, self._plan.views)
                cond_latents = [self._encode(*arrays, place_masks(arrays[0].shape[:-1], batch, each)) for each in masks]
                encoded = _EncodedBatch(batch, self._encode(*arrays), prefixes, cond_latents, masks, frames)
                if computed is not None:  # read the previous batch back while the devices encode this one
                    yield from self._extract_latents(computed)
                computed = encoded
            if computed is not None:
                yield from self._extract_latents(computed)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _get_batch_size(self, size: Grid) -> int:
        return self._encode.compute_batch_size(size, self._count[size])

    def _make_batches(self, canvases: Sequence[int]) -> Iterator[list[ClipCanvas]]:
        chosen = [self._plan.canvases[number] for number in canvases]
        for size, same in itertools.groupby(chosen, lambda one: one.size):
            members, rows = list(same), self._get_batch_size(size)
            yield from (members[first : first + rows] for first in range(0, len(members), rows))

    def _submit_decoding(self, pool: ThreadPoolExecutor, batch: Sequence[ClipCanvas]) -> dict[int, Future]:
        return {slot.clip: pool.submit(self._decode_view, slot.clip) for canvas in batch for slot in canvas.slots}

    def _decode_view(self, number: int) -> UInt8[np.ndarray, "T H W 3"] | Skipped:
        view = self._plan.views[number]
        info = self._clips.infos[view.clip]
        try:
            frames = read_fitted_clip(self._clips, view.clip, view.limits, start=view.start).frames
        except DecodeError as error:
            return Skipped(view.name, str(error), self._inputs[view.clip], info.name)
        if frames.shape[:3] != view.size:
            size = Grid(*frames.shape[:3])
            reason = f"decoded size {size} is not {view.size} of the index"
            return Skipped(view.name, reason, self._inputs[view.clip], info.name)
        return frames[:, :, ::-1] if view.flipped else frames

    def _draw_canvases(
        self, batch: Sequence[ClipCanvas], decoded: dict[int, Future]
    ) -> tuple[tuple[UInt8[np.ndarray, "B T H W 3"], Int32[np.ndarray, "B h w"]], dict[int, np.ndarray | Skipped]]:
        size, stride = batch[0].size, self._encoding.autoencoder.stride
        rows = self._get_batch_size(size)
        canvases = np.zeros((rows, *size, 3), np.uint8)
        inside = np.zeros((rows, size.h // stride.h, size.w // stride.w), np.int32)
        views: dict[int, np.ndarray | Skipped] = {}
        for row, canvas in enumerate(batch):
            inside[row] = compute_segment_ids(canvas, self._sizes, stride)
            for clip, top, left in canvas.slots:
                views[clip] = frames = decoded[clip].result()
                count_progress()
                if isinstance(frames, Skipped):
                    continue
                t, h, w = frames.shape[:3]
                canvases[row, :t, top : top + h, left : left + w] = frames
        return (canvases, inside), views

    def _extract_latents(self, batch: _EncodedBatch) -> Iterator[LatentExample | Skipped]:
        stride = self._encoding.autoencoder.stride
        values = np.asarray(batch.latents, np.float32)
        prefixes = {kept: np.asarray(latents, np.float32) for kept, latents in batch.prefixes.items()}
        cond_latents = [np.asarray(latents, np.float32) for latents in batch.cond_latents]
        for row, canvas in enumerate(batch.canvases):
            for clip, top, left in canvas.slots:
                frames = batch.frames[clip]
                if isinstance(frames, Skipped):
                    yield frames
                    continue
                view = self._plan.views[clip]
                info, grid = self._clips.infos[view.clip], latent_grid(view.size, stride)
                rows, columns = top // stride.h, left // stride.w
                region = row, slice(grid.t), slice(rows, rows + grid.h), slice(columns, columns + grid.w)
                encoded = {kept: latents[region] for kept, latents in prefixes.items()}
                fields = self._compute_fields(view, frames, encoded) | make_mask_values(
                    [latents[region] for latents in cond_latents], [masks[clip] for masks in batch.masks], stride
                )
                name, inputs = info.name, self._inputs[view.clip]
                yield LatentExample(view.name, info.captions, values[region], name, (), fields, inputs)

    def _compute_fields(
        self, view: View, frames: UInt8[np.ndarray, "T H W 3"], encoded: Mapping[int, Float32[np.ndarray, "t h w c"]]
    ) -> dict[str, np.ndarray]:
        encoding = self._encoding
        fields = compute_clip_fields(
            self._conditioning,
            self._clips,
            view.clip,
            view.limits,
            frames=frames,
            stride=encoding.autoencoder.stride,
            start=view.start,
            is_flipped=view.flipped,
            encoded=encoded,
        )
        if encoding.cond_latents:
            fields[COND_LATENTS] = encoded[1]
        if encoding.encode_image is not None:
            fields[IMAGE_TOKENS] = encoding.encode_image(frames[:1])[0]
        return fields


def _keep_first_frames(canvases: UInt8[np.ndarray, "B T H W 3"], count: int) -> Bool[np.ndarray, "B T 1 1"]:
    rows, frames = canvases.shape[:2]
    return np.broadcast_to((np.arange(frames) < count)[None, :, None, None], (rows, frames, 1, 1))


def measure_latent_moments(
    autoencoder: nnx.GraphDef, params: dict[str, Any], batches: Iterable[UInt8[np.ndarray, "_ _ _ _ 3"]]
) -> tuple[Float32[np.ndarray, " c"], Float32[np.ndarray, " c"]]:
    """Measure the mean and standard deviation of each latent channel, before normalisation, over batches of clips."""

    @jax.jit
    def encode_batch(params, batch):
        model = nnx.merge(autoencoder, params)
        return model.normalizer.denormalize(model.encode(pixels.to_float(batch)))

    total, squares, count = np.float64(0), np.float64(0), 0
    for batch in batches:
        latents = np.asarray(encode_batch(params, batch), np.float64)
        axes = tuple(range(latents.ndim - 1))
        total, squares = total + latents.sum(axes), squares + np.square(latents).sum(axes)
        count += latents[..., 0].size
    mean = total / count
    # The variance of a constant channel is zero up to rounding, which can make it negative.
    std = np.sqrt(np.maximum(squares / count - mean**2, 1e-12))
    return np.asarray(mean, np.float32), np.asarray(std, np.float32)
