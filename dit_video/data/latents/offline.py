"""From clips to the latents that a denoiser is trained on: which views are taken, and the autoencoder over them.

Clips of all sizes share canvases of at most eight sizes, so that as many programs are compiled. Files of the data set
are made one by one, by any number of processes, and a file that is there is not made again.
"""

import contextlib
import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float32, Int32, UInt8

from dit_video.autoencoders import AutoencoderConfig, Canvas, arrange, latent_grid, occupied, padding
from dit_video.autoencoders.canvas import PIXELS
from dit_video.core import config_json, pixels
from dit_video.core.errors import DecodeError, UserError
from dit_video.core.storage import Address, place
from dit_video.data.clips import ClipInfo, ClipSource
from dit_video.data.latents.cache import Identity, LatentExample, LeftOut, Storage, identity_hash
from dit_video.data.latents.online import CanvasEncoder
from dit_video.data.latents.writer import LatentFiles
from dit_video.data.sizes import SizeLimits, fit, read_fitted, sampled_frames
from dit_video.encoders.image import ImageEncoder
from dit_video.encoders.text import FrozenEncoder
from dit_video.experiment import Experiment
from dit_video.pipelines import pipeline
from dit_video.text import Tokenizer
from dit_video.tokens import Grid

EncodeText = Callable[[str], Float32[np.ndarray, "s e"]]
"""A caption to its embedding: real tokens only."""
EncodeImage = Callable[[UInt8[np.ndarray, "T H W 3"]], Float32[np.ndarray, "T i F"]]
"""Frames to an image encoder's tokens."""
First = UInt8[np.ndarray, "1 _ _ 3"]
_TEXTS = 64
"""Embeddings that are kept, as the views of a clip and the clips of a class share their captions. One may take 8 MB."""


@dataclass(frozen=True, kw_only=True)
class Augmentations:
    """Which views are taken of every clip.

    Raises:
      UserError: no stretch, or a resolution of no pixels.
    """

    stretches: int = 1
    """up to so many stretches of the training length, spread over the clip's"""
    resolutions: tuple[int, ...] = ()
    """further, smaller limits on the pixels of a frame, at which every clip is taken too"""
    flips: bool = False
    """each view is taken mirrored too. Captions that say left or right then lie."""

    def __post_init__(self):
        if self.stretches < 1 or any(resolution < 1 for resolution in self.resolutions):
            raise UserError(
                f"stretches={self.stretches} and resolutions={list(self.resolutions)} must be at least 1 each"
            )


class View(NamedTuple):
    """One of the ways in which a clip is encoded."""

    name: str
    clip: int
    start: int
    """the sampled frame that is its first"""
    limits: SizeLimits
    size: Grid
    """in frames and pixels"""
    flipped: bool


def views(infos: Sequence[ClipInfo], limits: SizeLimits, augmentations: Augmentations) -> list[View]:
    """The views of every clip. A smaller resolution that a clip has already is not taken twice.

    They are named `clip.mp4@0`, by their first frame, then `~64x96` in a smaller resolution and `~flipped`.

    Raises:
      UserError: a clip without a size within the limits.
    """
    found = []
    for number, info in enumerate(infos):
        sizes = {fit(info, limits): limits}
        for resolution in augmentations.resolutions:
            smaller = replace(limits, max_pixels=min(resolution, limits.max_pixels))
            sizes.setdefault(fit(info, smaller), smaller)
        for (size, within), start, flipped in itertools.product(
            sizes.items(), _starts(info, limits, augmentations.stretches), (False, True)[: 1 + augmentations.flips]
        ):
            smaller_name = f"~{size.h}x{size.w}" if within is not limits else ""
            name = f"{info.name}@{start}{smaller_name}" + "~flipped" * flipped
            found.append(View(name, number, start, within, size, flipped))
    return found


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """What turns clips into latents.

    Raises:
      UserError: files of no views, or no threads.
    """

    autoencoder: AutoencoderConfig
    params: dict[str, Any] = field(repr=False)
    limits: SizeLimits
    augmentations: Augmentations = field(default_factory=Augmentations)
    encode_text: EncodeText | None = None
    """of an encoder that isn't trained with the denoiser"""
    text_identity: str = ""
    """of that encoder: the part `text` of the latents' identity"""
    encode_image: EncodeImage | None = None
    """of an encoder whose tokens of a clip's first frame the denoiser attends to"""
    image_identity: str = ""
    """of that encoder: the part `image` of the latents' identity"""
    shown: bool = False
    """whether the latents of each view with all grey behind its first frame are made too"""
    storage: Storage = "bfloat16"
    canvas_pixels: int = PIXELS
    """of a canvas over its frames, about: what a device works on at once"""
    views_per_file: int = 512
    threads: int = min(4, os.cpu_count() or 1)
    """that decode"""

    def __post_init__(self):
        if self.views_per_file < 1 or self.threads < 1:
            raise UserError(f"views_per_file={self.views_per_file} and threads={self.threads} must be at least 1")


def encoding_of(
    experiment: Experiment, params: dict[str, Any], *, text: Tokenizer | FrozenEncoder, images: ImageEncoder | None
) -> Encoding:
    """That of an experiment, with the parameters of its autoencoder and its frozen encoders."""
    data, known = experiment.data, experiment.denoiser.known
    frozen = text if isinstance(text, FrozenEncoder) else None
    return Encoding(
        autoencoder=experiment.autoencoder.model,
        params=params,
        limits=experiment.limits,
        augmentations=Augmentations(stretches=data.stretches, resolutions=data.resolutions, flips=data.flips),
        encode_text=frozen,
        text_identity="" if frozen is None else frozen.identity,
        encode_image=images,
        image_identity="" if images is None else images.identity,
        shown=known is not None and known.rest == "grey",
    )


@dataclass(frozen=True, kw_only=True)
class EncodingPlan:
    """What is computed together, and which file it goes to."""

    views: tuple[View, ...]
    canvases: tuple[Canvas, ...]
    """Those of one size lie together."""
    files: tuple[range, ...]
    """the canvases of each"""

    @property
    def hash(self) -> str:
        """Equal for plans that give equal files."""
        return hashlib.sha256(repr((self.views, self.canvases, self.files)).encode()).hexdigest()[:16]

    @property
    def programs(self) -> int:
        """How many sizes of canvases there are."""
        return len({canvas.size for canvas in self.canvases})

    @property
    def padding(self) -> float:
        """Share of the computed pixels that are no clip's."""
        return padding(self.canvases, [view.size for view in self.views])

    def count(self, file: int) -> int:
        """How many views a file holds."""
        return sum(len(self.canvases[canvas].places) for canvas in self.files[file])


def plan_encoding(clips: ClipSource, encoding: Encoding) -> EncodingPlan:
    """The same plan in every process.

    Raises:
      UserError: no clips, or one without a size within the limits.
    """
    taken = views(clips.infos, encoding.limits, encoding.augmentations)
    if not taken:
        raise UserError("there are no clips to encode; ingest at least one")
    canvases = arrange([view.size for view in taken], stride=encoding.autoencoder.stride, pixels=encoding.canvas_pixels)
    files, first, held = [], 0, 0
    for number, canvas in enumerate(canvases):
        if held and held + len(canvas.places) > encoding.views_per_file:
            files.append(range(first, number))
            first, held = number, 0
        held += len(canvas.places)
    return EncodingPlan(views=tuple(taken), canvases=tuple(canvases), files=(*files, range(first, len(canvases))))


def latent_identity(encoding: Encoding, clips: ClipSource) -> dict[str, Any]:
    """What the latents of these clips depend on, and the denoiser's training asks of them."""
    beside = {"text": encoding.text_identity, "image": encoding.image_identity, "behind": "grey" * encoding.shown}
    return {name: value for name, value in beside.items() if value} | {
        "autoencoder": pipeline.identity(encoding.autoencoder, encoding.params),
        "limits": config_json.to_json(encoding.limits),
        "augmentations": config_json.to_json(encoding.augmentations),
        "clips": identity_hash({"infos": [list(info) for info in clips.infos]}),
    }


def encode_latents(
    destination: Address,
    clips: ClipSource,
    encoding: Encoding,
    plan: EncodingPlan,
    *,
    identity: Identity,
    shard: int = 0,
    shards: int = 1,
    progress: Callable[[int], None] | None = None,
) -> bool:
    """Make this process's share of the files that are not there yet, and the index once all are.

    Args:
      destination: the folder, or an address (`gs://…`), see `data.places`.
      clips: what is encoded.
      encoding: by what.
      plan: of `plan_encoding`, for the same clips and encoding.
      identity: of the autoencoder and all else that latents depend on; training asks for it again.
      shard: this process's number; it makes the files `shard`, `shard + shards`, …
      shards: how many processes there are.
      progress: called with the number of views that are done, of those in this process's files.

    Returns:
      whether the data set is finished, the files of the other processes too.

    Raises:
      UserError: a destination with other latents, embeddings or image tokens without the identity of their encoder, or
        a share that doesn't exist.
    """
    if not 0 <= shard < shards:
        raise UserError(f"shard={shard} must be one of 0 to {shards - 1}")
    if encoding.encode_text is not None and (isinstance(identity, str) or "text" not in identity):
        raise UserError("texts are embedded, so the latents' identity needs the part text: that of the encoder")
    if encoding.encode_image is not None and (isinstance(identity, str) or "image" not in identity):
        raise UserError("first frames are encoded, so the latents' identity needs the part image: that of the encoder")
    files = LatentFiles(
        folder=place(destination), identity=identity, files=len(plan.files), plan=plan.hash, dtype=encoding.storage
    )
    encoder = _Encoder(clips, encoding, plan)
    done = 0
    for number in range(shard, len(plan.files), shards):
        if (there := files.done(number)) is None:

            def counted(number: int = number, before: int = done) -> Iterator[LatentExample | LeftOut]:
                for count, example in enumerate(encoder.examples(plan.files[number]), before + 1):
                    yield example
                    if progress is not None:
                        progress(count)

            files.write(number, counted())
            there = plan.count(number)
        done += there
        if progress is not None:
            progress(done)
    return finish_latents(destination, encoding, plan, identity=identity)


def finish_latents(destination: Address, encoding: Encoding, plan: EncodingPlan, *, identity: Identity) -> bool:
    """Write the index if all files are there; returns whether it is."""
    files = LatentFiles(
        folder=place(destination), identity=identity, files=len(plan.files), plan=plan.hash, dtype=encoding.storage
    )
    return files.finish(empty_text=None if encoding.encode_text is None else encoding.encode_text(""))


class _Encoder:
    """The autoencoder over canvases, on all devices of this process, while threads decode the next ones."""

    def __init__(self, clips: ClipSource, encoding: Encoding, plan: EncodingPlan):
        self._clips, self._encoding, self._plan = clips, encoding, plan
        self._sizes = [view.size for view in plan.views]
        self._encode = CanvasEncoder(encoding.autoencoder, encoding.params, canvas_pixels=encoding.canvas_pixels)
        self._text = None if encoding.encode_text is None else lru_cache(_TEXTS)(encoding.encode_text)
        self._count = {size: len(list(same)) for size, same in itertools.groupby(plan.canvases, lambda one: one.size)}

    def examples(self, canvases: Sequence[int]) -> Iterator[LatentExample | LeftOut]:
        """The views on some canvases, in their order."""
        if not canvases:
            return
        # Read once here, so that a data set that can't be opened is no fault of each clip in it.
        with contextlib.suppress(DecodeError):
            self._clips[self._plan.views[self._plan.canvases[canvases[0]].places[0].clip].clip]
        batches = list(self._batches(canvases))
        pool = ThreadPoolExecutor(self._encoding.threads, thread_name_prefix="decode")
        try:
            decoded, computed = self._begin(pool, batches[0]), None
            for number, batch in enumerate(batches):
                current = decoded
                decoded = self._begin(pool, batches[number + 1]) if number + 1 < len(batches) else {}
                arrays, firsts = self._drawn(batch, current)
                latents = self._encode(*arrays)
                shown = self._encode(*arrays, first=True) if self._encoding.shown else None
                if computed is not None:  # what was begun before is taken while this is computed
                    yield from self._cut(*computed)
                computed = batch, latents, shown, firsts
            if computed is not None:
                yield from self._cut(*computed)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _rows(self, size: Grid) -> int:
        """Canvases of one size that are computed together."""
        return self._encode.together(size, self._count[size])

    def _batches(self, canvases: Sequence[int]) -> Iterator[list[Canvas]]:
        chosen = [self._plan.canvases[number] for number in canvases]
        for size, same in itertools.groupby(chosen, lambda one: one.size):
            members, rows = list(same), self._rows(size)
            yield from (members[first : first + rows] for first in range(0, len(members), rows))

    def _begin(self, pool: ThreadPoolExecutor, batch: Sequence[Canvas]) -> dict[int, Future]:
        return {place.clip: pool.submit(self._frames, place.clip) for canvas in batch for place in canvas.places}

    def _frames(self, number: int) -> UInt8[np.ndarray, "T H W 3"] | LeftOut:
        view = self._plan.views[number]
        try:
            frames = read_fitted(self._clips, view.clip, view.limits, start=view.start).frames
        except DecodeError as error:
            return LeftOut(view.name, str(error))
        if frames.shape[:3] != view.size:
            found = "x".join(map(str, frames.shape[:3]))
            return LeftOut(
                view.name, f"it was decoded to {found}, the index says {view.size.t}x{view.size.h}x{view.size.w}"
            )
        return frames[:, :, ::-1] if view.flipped else frames

    def _drawn(
        self, batch: Sequence[Canvas], decoded: dict[int, Future]
    ) -> tuple[tuple[UInt8[np.ndarray, "B T H W 3"], Int32[np.ndarray, "B h w"]], dict[int, First | LeftOut]]:
        """The canvases with their clips, which of their latents are a clip's, and the clips' first frames, or why there
        is none."""
        size, stride = batch[0].size, self._encoding.autoencoder.stride
        rows = self._rows(size)
        canvases = np.zeros((rows, *size, 3), np.uint8)
        inside = np.zeros((rows, size.h // stride.h, size.w // stride.w), np.int32)
        firsts = {}
        for row, canvas in enumerate(batch):
            inside[row] = occupied(canvas, self._sizes, stride)
            for clip, top, left in canvas.places:
                frames = decoded[clip].result()
                firsts[clip] = frames
                if not isinstance(frames, LeftOut):
                    firsts[clip] = frames[:1].copy()
                    t, h, w = frames.shape[:3]
                    canvases[row, :t, top : top + h, left : left + w] = frames
        return (canvases, inside), firsts

    def _cut(
        self, batch: Sequence[Canvas], latents: Array, shown: Array | None, firsts: dict[int, First | LeftOut]
    ) -> Iterator[LatentExample | LeftOut]:
        """The clips' latents out of those of their canvases, with what stands beside them."""
        stride, encode_image = self._encoding.autoencoder.stride, self._encoding.encode_image
        values, beside = (None if each is None else np.asarray(each, np.float32) for each in (latents, shown))
        assert values is not None
        for row, canvas in enumerate(batch):
            for clip, top, left in canvas.places:
                first = firsts[clip]
                if isinstance(first, LeftOut):
                    yield first
                    continue
                view = self._plan.views[clip]
                info, grid = self._clips.infos[view.clip], latent_grid(view.size, stride)
                rows, columns = top // stride.h, left // stride.w
                at = row, slice(grid.t), slice(rows, rows + grid.h), slice(columns, columns + grid.w)
                text = () if self._text is None else tuple(self._text(caption) for caption in info.captions)
                yield LatentExample(
                    view.name,
                    info.captions,
                    values[at],
                    info.name,
                    text,
                    shown=None if beside is None else beside[at],
                    image=None if encode_image is None else encode_image(first)[0],
                )


def _starts(info: ClipInfo, limits: SizeLimits, most: int) -> list[int]:
    spare = sampled_frames(info, limits) - fit(info, limits).t
    count = min(most, spare + 1)
    return sorted({round(spare * index / max(1, count - 1)) for index in range(count)})


def latent_moments(
    autoencoder: nnx.GraphDef, params: dict[str, Any], batches: Iterable[UInt8[np.ndarray, "_ _ _ _ 3"]]
) -> tuple[Float32[np.ndarray, " c"], Float32[np.ndarray, " c"]]:
    """Mean and standard deviation of each latent channel, before normalisation, over batches of clips."""

    @jax.jit
    def encoded(params, batch):
        model = nnx.merge(autoencoder, params)
        return model.normalizer.restore(model.encode(pixels.to_float(batch)))

    total, squares, count = np.float64(0), np.float64(0), 0
    for batch in batches:
        latents = np.asarray(encoded(params, batch), np.float64)
        axes = tuple(range(latents.ndim - 1))
        total, squares = total + latents.sum(axes), squares + np.square(latents).sum(axes)
        count += latents[..., 0].size
    mean = total / count
    # A channel that says nothing has no variance, up to rounding that can make it negative.
    std = np.sqrt(np.maximum(squares / count - mean**2, 1e-12))
    return np.asarray(mean, np.float32), np.asarray(std, np.float32)
