"""Encoding of clips as latents for the denoiser's training: selection of views, and the autoencoder over them.

Clips of all sizes share canvases of at most eight sizes, so that as many programs are compiled. The files of a data set
are written one by one, by any number of processes; a file that exists is not written again.
"""

import contextlib
import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float32, Int32, UInt8

from dit_video.autoencoders import (
    AutoencoderConfig,
    ClipCanvas,
    compute_padding_share,
    compute_segment_ids,
    latent_grid,
    pack_canvases,
)
from dit_video.autoencoders.canvas import CANVAS_PIXELS
from dit_video.conditioning import (
    COND_LATENTS,
    IMAGE_TOKENS,
    ClipConditioning,
    ClipView,
    KnownMask,
    MaskGenerator,
    make_mask_fields,
)
from dit_video.core import config_json, pixels
from dit_video.core.errors import DecodeError, UserError, check_at_least
from dit_video.core.storage import StoragePathLike, to_storage_path
from dit_video.data.clips import ClipSource
from dit_video.data.latents.cache import Identity, LatentExample, LatentSource, Skipped, StorageDtype
from dit_video.data.latents.online import CanvasEncoder
from dit_video.data.latents.view_masks import draw_view_masks, make_mask_values, place_masks
from dit_video.data.latents.views import Augmentations, View, list_views
from dit_video.data.latents.writer import LatentWriter, read_encoded
from dit_video.data.sizes import SizeLimits, read_fitted_clip
from dit_video.data.tables import compute_row_id
from dit_video.encoders.autoencoder import compute_autoencoder_identity
from dit_video.encoders.image import FrozenImageEncoder
from dit_video.tokens import Field, Grid

EncodeText = Callable[[str], Float32[np.ndarray, "s e"]]
_CAPTIONS_PER_FILE = 4096
"""Number of captions in a file of embeddings alone. One may take 8 MB."""


class _EncodedBatch(NamedTuple):
    """Canvases with their latents, which the devices may still compute."""

    canvases: Sequence[ClipCanvas]
    latents: Array
    prefixes: dict[int, Array]
    """Latents of the canvases of which only so many first frames are kept; see `Encoding.list_prefixes`."""
    cond_latents: list[Array]
    """Latents of the canvases with all but the known pixels grey, for each kind of mask."""
    masks: list[dict[int, KnownMask]]
    """Masks of the views, for each kind."""
    frames: dict[int, UInt8[np.ndarray, "_ _ _ 3"] | Skipped]
    """Frames of each view."""


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """Encoders and settings that turn clips into latents.

    Raises:
      UserError: files without views, or no threads.
    """

    autoencoder: AutoencoderConfig
    params: dict[str, Any] = field(repr=False)
    limits: SizeLimits
    augmentations: Augmentations = field(default_factory=Augmentations)
    encode_text: EncodeText | None = None
    text_identity: str = ""
    encode_image: FrozenImageEncoder | None = None
    """Encoder of the first frame, to whose tokens the denoiser attends."""
    conditioning: tuple[ClipConditioning, ...] = ()
    """Conditioning by fields of the clips."""
    image_identity: str = ""
    cond_latents: bool = False
    """True to also encode each view with all frames after the first set to grey."""
    masks: tuple[MaskGenerator, ...] = ()
    """Kinds of masks of known pixels, for each of which every view is encoded with all other pixels grey."""
    storage: StorageDtype = "bfloat16"
    canvas_pixels: int = CANVAS_PIXELS
    """Approximate number of pixels of a canvas over its frames, which a device encodes at once."""
    views_per_file: int = 512
    threads: int = min(4, os.cpu_count() or 1)

    def __post_init__(self):
        check_at_least(1, views_per_file=self.views_per_file, threads=self.threads)

    def list_prefixes(self) -> tuple[int, ...]:
        """Return the numbers of first frames that are kept, all others grey, when a clip is encoded once more."""
        own = {number for each in self.conditioning for number in each.encoded_prefixes}
        return tuple(sorted(own | {1} if self.cond_latents else own))

    def make_fields(self) -> tuple[Field, ...]:
        """Return the further fields of the latents, for denoisers that are conditioned on first frames."""
        channels, fields = self.autoencoder.channels, list[Field]()
        if self.cond_latents:
            fields.append(Field(name=COND_LATENTS, alignment="grid", shape=(channels,)))
        if self.encode_image is not None:
            length, width = self.encode_image.shape
            fields.append(Field(name=IMAGE_TOKENS, alignment="sequence", shape=(width,), length=length))
        for kind in range(len(self.masks)):
            fields += make_mask_fields(channels=channels, temporal_stride=self.autoencoder.stride.t, kind=kind)
        return (*fields, *(each.field for each in self.conditioning))


@dataclass(frozen=True, kw_only=True)
class EncodingPlan:
    """Assignment of views to canvases, and of canvases to files."""

    views: tuple[View, ...]
    canvases: tuple[ClipCanvas, ...]
    files: tuple[range, ...]
    captions: tuple[tuple[str, ...], ...] = ()
    """Captions whose embeddings each file holds; captions of clips without views have files of their own."""

    @property
    def hash(self) -> str:
        """Return a hash that is equal for plans that give equal files."""
        content = (self.views, self.canvases, self.files, self.captions)
        return hashlib.sha256(repr(content).encode()).hexdigest()[:16]

    @property
    def num_canvas_sizes(self) -> int:
        """Return the number of canvas sizes, each of which is compiled once."""
        return len({canvas.size for canvas in self.canvases})

    @property
    def padding_share(self) -> float:
        """Return the share of the encoded pixels that belong to no clip."""
        return compute_padding_share(self.canvases, [view.size for view in self.views])

    def count_views(self, file: int) -> int:
        """Return the number of views in a file."""
        return sum(len(self.canvases[canvas].slots) for canvas in self.files[file])


def plan_encoding(clips: ClipSource, encoding: Encoding, destination: StoragePathLike | None = None) -> EncodingPlan:
    """Plan the encoding of clips; every process gets the same plan.

    Args:
      clips: clips to encode.
      encoding: encoders and settings.
      destination: folder of latents; views and captions that it holds are left out.

    Raises:
      UserError: no clips, or one without a size within the limits.
    """
    clip_views = list_views(clips.infos, encoding.limits, encoding.augmentations)
    if not clip_views:
        raise UserError("there are no clips to encode; ingest at least one")
    known_views, known_captions = set[int](), set[int]()
    if destination is not None:
        known_views, known_captions = (set(ids.tolist()) for ids in read_encoded(to_storage_path(destination)))
    payloads = clips.column("payload")
    views = [view for view in clip_views if compute_row_id(view.name, payloads[view.clip]) not in known_views]
    sizes = [view.size for view in views]
    canvases = pack_canvases(sizes, stride=encoding.autoencoder.stride, pixels=encoding.canvas_pixels) if sizes else []
    files, first, count = [], 0, 0
    for number, canvas in enumerate(canvases):
        if count and count + len(canvas.slots) > encoding.views_per_file:
            files.append(range(first, number))
            first, count = number, 0
        count += len(canvas.slots)
    files += [range(first, len(canvases))] if views else []
    plan = EncodingPlan(views=tuple(views), canvases=tuple(canvases), files=tuple(files))
    return plan if encoding.encode_text is None else _plan_captions(plan, clips, known_captions)


def _plan_captions(plan: EncodingPlan, clips: ClipSource, known: set[int]) -> EncodingPlan:
    """Return the plan with the captions that are not embedded yet: in the file of the first view that has them."""
    infos, seen = clips.infos, set(known)

    def take_new(captions: Iterable[str]) -> tuple[str, ...]:
        new = [each for each in dict.fromkeys(captions) if compute_row_id(each) not in seen]
        seen.update(map(compute_row_id, new))
        return tuple(new)

    groups = []
    for number, file in enumerate(plan.files):
        examples = [plan.views[slot.clip].clip for canvas in file for slot in plan.canvases[canvas].slots]
        texts = itertools.chain.from_iterable(infos[example].captions for example in examples)
        groups.append(take_new(itertools.chain(("",) if number == 0 else (), texts)))
    others = take_new(itertools.chain(("",), *(info.captions for info in infos)))
    groups += [others[first : first + _CAPTIONS_PER_FILE] for first in range(0, len(others), _CAPTIONS_PER_FILE)]
    files = (*plan.files, *[range(0)] * (len(groups) - len(plan.files)))
    return replace(plan, files=files, captions=tuple(groups))


def compute_latent_identity(encoding: Encoding) -> dict[str, Any]:
    """Return the identity that the denoiser's training asks of the latents: all that they depend on except clips."""
    optional = {
        "text": encoding.text_identity,
        "image": encoding.image_identity,
        "behind": "grey" * encoding.cond_latents,
        "conditioning": config_json.to_json(encoding.conditioning),
        "masks": config_json.to_json(encoding.masks),
    }
    return {name: value for name, value in optional.items() if value} | {
        "autoencoder": compute_autoencoder_identity(encoding.autoencoder, encoding.params),
        "limits": config_json.to_json(encoding.limits),
        "augmentations": config_json.to_json(encoding.augmentations),
    }


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
      destination: the folder, or an address (`gs://…`); see `core.storage`.
      clips, encoding, plan: clips, encoders and settings, and their `plan_encoding`.
      identity: identity of the autoencoder and of all else that the latents depend on; training asks for it again.
      shard: number of this process among `shards`, which writes the files `shard`, `shard + shards`, …
      progress: called with the number of finished views in this process's files.

    Raises:
      UserError: a destination with other latents, an identity without that of a used encoder, or no such shard.
    """
    if not 0 <= shard < shards:
        raise UserError(f"shard={shard} must be one of 0 to {shards - 1}")
    for part, function in (("text", encoding.encode_text), ("image", encoding.encode_image)):
        if function is not None and (isinstance(identity, str) or part not in identity):
            raise UserError(f"identity lacks the part {part}, which is encoded. Add that of the {part} encoder.")
    files = _make_writer(destination, encoding, plan, identity)
    encoder = _Encoder(clips, encoding, plan)
    done = 0
    for number in range(shard, len(plan.files), shards):
        if not files.has_file(number):

            def counted_examples(number: int = number, before: int = done) -> Iterator[LatentExample | Skipped]:
                for count, example in enumerate(encoder.examples(plan.files[number]), before + 1):
                    yield example
                    progress(count)

            files.write(number, counted_examples(), encoder.embed(number))
        done += plan.count_views(number)
        progress(done)
    return finish_latents(destination, clips, encoding, plan, identity=identity)


def finish_latents(
    destination: StoragePathLike, clips: ClipSource, encoding: Encoding, plan: EncodingPlan, *, identity: Identity
) -> bool:
    """Write the table if all files exist; returns True if they do."""
    views = list_views(clips.infos, encoding.limits, encoding.augmentations)
    captions, payloads = clips.column("captions"), clips.column("payload")
    current = {compute_row_id(view.name, payloads[view.clip]): captions[view.clip] for view in views}
    return _make_writer(destination, encoding, plan, identity).finish(captions=current.get)


def check_clips(latents: LatentSource, clips: ClipSource, encoding: Encoding) -> None:
    """Check that latents are those of some clips, with the captions that these have now.

    Raises:
      UserError: they are of other clips, or captions have changed.
    """
    views = list_views(clips.infos, encoding.limits, encoding.augmentations)
    names, captions, payloads = (clips.column(name) for name in ("name", "captions", "payload"))
    expected = {
        compute_row_id(view.name, payloads[view.clip]): (names[view.clip], tuple(captions[view.clip])) for view in views
    }
    actual = dict(zip(latents.ids.tolist(), zip(latents.clips, latents.all_captions, strict=True), strict=True))
    skipped = {each.name for each in latents.skipped}
    missing = [
        view.name
        for view in views
        if view.name not in skipped and compute_row_id(view.name, payloads[view.clip]) not in actual
    ]
    changed = [value[0] for key, value in actual.items() if expected.get(key) != value]
    if missing or changed:
        raise UserError(
            f"{latents.folder} holds latents of other clips or captions ({len(missing)} are missing, {len(changed)} "
            f"have changed, such as {(missing or changed)[0]}). Encode the clips again into this folder with "
            "tools/encode_latents.py, which encodes what is new alone."
        )


def _make_writer(folder: StoragePathLike, encoding: Encoding, plan: EncodingPlan, identity: Identity) -> LatentWriter:
    folder, count = to_storage_path(folder), len(plan.files)
    options: dict[str, Any] = {"num_files": count, "plan_hash": plan.hash, "dtype": encoding.storage}
    return LatentWriter(folder=folder, identity=identity, fields=encoding.make_fields(), **options)


class _Encoder:  # encodes canvases on all devices of this process while threads decode the next ones
    def __init__(self, clips: ClipSource, encoding: Encoding, plan: EncodingPlan):
        self._clips, self._encoding, self._plan = clips, encoding, plan
        self._sizes = [view.size for view in plan.views]
        self._encode = CanvasEncoder(encoding.autoencoder, encoding.params, canvas_pixels=encoding.canvas_pixels)
        self._count = {size: len(list(same)) for size, same in itertools.groupby(plan.canvases, lambda one: one.size)}

    def embed(self, file: int) -> Iterator[tuple[str, Float32[np.ndarray, "s e"]]]:
        """Yield the captions of a file, and their embeddings."""
        if self._encoding.encode_text is not None:
            for caption in self._plan.captions[file]:
                yield caption, self._encoding.encode_text(caption)

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
        payload = self._clips.infos[view.clip].payload
        try:
            frames = read_fitted_clip(self._clips, view.clip, view.limits, start=view.start).frames
        except DecodeError as error:
            return Skipped(view.name, str(error), payload)
        if frames.shape[:3] != view.size:
            size = Grid(*frames.shape[:3])
            return Skipped(view.name, f"decoded size {size} is not {view.size} of the index", payload)
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
                seen = ClipView(info.name, frames, grid, view.start, view.flipped, encoded)
                fields = self._compute_fields(seen) | make_mask_values(
                    [latents[region] for latents in cond_latents], [masks[clip] for masks in batch.masks], stride
                )
                yield LatentExample(view.name, info.captions, values[region], info.name, (), fields, info.payload)

    def _compute_fields(self, view: ClipView) -> dict[str, np.ndarray]:
        encode_image = self._encoding.encode_image
        fields = {each.field.name: each.from_clip(view) for each in self._encoding.conditioning}
        if self._encoding.cond_latents:
            fields[COND_LATENTS] = view.encoded[1]
        if encode_image is not None:
            fields[IMAGE_TOKENS] = encode_image(view.frames[:1])[0]
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
