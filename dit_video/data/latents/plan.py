"""Plan of an encoding: views of clips (crops in time, resolutions, mirrored copies), their canvases and files."""

import hashlib
import itertools
import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float32, Int64

from dit_video.core import config_json
from dit_video.core.errors import UserError, check_at_least
from dit_video.core.rng import make_generator
from dit_video.core.storage import StoragePathLike, to_storage_path
from dit_video.data.clips import ClipInfo, ClipSource
from dit_video.data.latents.cache import LatentSource, StorageDtype
from dit_video.data.latents.codec import compute_autoencoder_identity
from dit_video.data.latents.writer import read_encoded
from dit_video.data.sizes import SizeLimits, count_sampled_frames, fit_size
from dit_video.data.tables import compute_row_id
from dit_video.models.autoencoders import AutoencoderConfig, ClipCanvas, compute_padding_share, pack_canvases
from dit_video.models.autoencoders.canvas import CANVAS_PIXELS
from dit_video.models.conditioning import (
    COND_LATENTS,
    IMAGE_TOKENS,
    ClipConditioning,
    IsKnown,
    MaskGenerator,
    fold_mask,
    make_mask_fields,
)
from dit_video.tokens import Field, Grid
from dit_video.weights.frozen_encoders import FrozenImageEncoder

EncodeText = Callable[[str], Float32[np.ndarray, "s e"]]
OpenConditioning = Callable[[], tuple[ClipConditioning, ...]]
_CAPTIONS_PER_FILE = 4096
"""Number of captions in a file of embeddings alone. One may take 8 MB."""


@dataclass(frozen=True, kw_only=True)
class Augmentations:
    """Selection of the views of every clip.

    Raises:
      UserError: If there is no crop, or a resolution has no pixels.
    """

    clips_per_video: int = 1
    """Largest number of temporal crops of the training length, spread over the clip."""
    resolutions: tuple[int, ...] = ()
    """Further, smaller limits on the pixels of a frame: every clip is encoded at each of them, too."""
    flips: bool = False
    """True to encode each view mirrored too. Captions that say left or right are then wrong."""

    def __post_init__(self):
        check_at_least(1, clips_per_video=self.clips_per_video, resolutions=min(self.resolutions, default=None))

    def list_limits(self, limits: SizeLimits) -> tuple[SizeLimits, ...]:
        """Return the limits of every resolution, beginning with the largest: a clip has a view at each of them."""
        smaller = (min(resolution, limits.max_pixels) for resolution in self.resolutions)
        return (limits, *(replace(limits, max_pixels=max_pixels) for max_pixels in smaller))


class View(NamedTuple):
    """One of the ways in which a clip is encoded."""

    name: str
    clip: int
    start: int
    """First of the sampled frames that the view shows."""
    limits: SizeLimits
    size: Grid
    flipped: bool


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """Encoders and settings that turn clips into latents.

    Raises:
      UserError: If files would hold no views, or there are no threads.
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
    open_conditioning: OpenConditioning | None = None
    """Function that opens it before clips are encoded; None for conditioning that reads no files."""
    image_identity: str = ""
    cond_latents: bool = False
    """True to also encode each view with all frames after the first set to grey."""
    masks: tuple[MaskGenerator, ...] = ()
    """Kinds of masks of known pixels: every view is encoded for each of them with all other pixels grey."""
    storage: StorageDtype = "bfloat16"
    canvas_pixels: int = CANVAS_PIXELS
    """Approximate number of pixels of a canvas over its frames, which a device encodes at once."""
    views_per_file: int = 512
    threads: int = min(4, os.cpu_count() or 1)

    def __post_init__(self):
        check_at_least(1, views_per_file=self.views_per_file, threads=self.threads)

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the columns of the data set that the conditioning reads, sorted."""
        return tuple(sorted({name for each in self.conditioning for name in each.columns}))

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
        """Return the number of canvas sizes; each one is compiled once."""
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
      clips: Clips to encode.
      encoding: Encoders and settings.
      destination: Folder of latents; views and captions that it holds are left out.

    Raises:
      UserError: If there are no clips, or one has no size within the limits.
    """
    clip_views = list_views(clips.infos, encoding.limits, encoding.augmentations)
    if not clip_views:
        raise UserError("there are no clips to encode; ingest at least one")
    known_views, known_captions = set[int](), set[int]()
    if destination is not None:
        known_views, known_captions = (set(ids.tolist()) for ids in read_encoded(to_storage_path(destination)))
    inputs = hash_inputs(clips, encoding.columns)
    views = [view for view in clip_views if compute_row_id(view.name, inputs[view.clip]) not in known_views]
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


def hash_inputs(clips: ClipSource, columns: Sequence[str]) -> list[str]:
    """Return a hash of each clip's content and of its values in some columns: of all that its encoding is made from."""
    contents = clips.list_contents()
    if not columns:
        return contents
    values = (each.tolist() if isinstance(each, np.ndarray) else each for each in map(clips.column, columns))
    pairs = zip(contents, *values, strict=True)
    return [hashlib.sha256(repr(each).encode("utf-8", "surrogatepass")).hexdigest() for each in pairs]


ENCODE_AGAIN = "Encode the clips again into this folder with tools/encode_latents.py, which encodes what is new alone."
"""Advice for latents of other clips."""


def check_clips(
    latents: LatentSource, clips: ClipSource, columns: Sequence[str] = (), *, fix: str = ENCODE_AGAIN
) -> None:
    """Check that latents are those of some clips, with the captions and values of columns that these have now.

    The views of a clip are not compared: they follow from the clip and from the identity of the latents. `fix` is the
    advice in the message.

    Raises:
      UserError: If the latents are of other clips, or captions have changed.
    """
    names, inputs = (pa.array(each, pa.string()) for each in (clips.column("name"), hash_inputs(clips, columns)))
    keys, own_keys = pc.binary_join_element_wise(names, inputs, "\0"), latents.clip_keys
    skipped = [f"{each.clip}\0{each.payload}" for each in latents.skipped]
    known = pa.chunked_array([*own_keys.chunks, pa.array(skipped, pa.string())])
    is_missing = pc.invert(pc.is_in(keys, value_set=known)).to_numpy(False)
    numbers = pc.fill_null(pc.index_in(own_keys, value_set=keys), -1).to_numpy()
    captions, own_captions = map(_hash_captions, (clips.column("captions"), latents.all_captions))
    is_changed = (numbers < 0) | (own_captions != np.append(captions, 0)[numbers])
    if is_missing.any() or is_changed.any():
        first = names[is_missing.argmax()].as_py() if is_missing.any() else latents.clips[is_changed.argmax()]
        raise UserError(
            f"{latents.folder} holds latents of other clips or captions ({is_missing.sum()} clips are missing, "
            f"{is_changed.sum()} examples have changed, such as {first}). {fix}"
        )


def _hash_captions(captions: Sequence[tuple[str, ...]]) -> Int64[np.ndarray, " n"]:
    return np.fromiter(map(hash, captions), np.int64, len(captions))


def list_views(infos: Sequence[ClipInfo], limits: SizeLimits, augmentations: Augmentations) -> list[View]:
    """Return the views of every clip, without a smaller resolution that equals the clip's own.

    A view is named `clip.mp4@0`, by its first frame, followed by `~64x96` in a smaller resolution and by `~flipped`.

    Raises:
      UserError: If a clip has no size within the limits.
    """
    clip_views = []
    for number, info in enumerate(infos):
        sizes: dict[Grid, SizeLimits] = {}
        for size_limits in augmentations.list_limits(limits):
            sizes.setdefault(fit_size(info, size_limits), size_limits)
        for (size, size_limits), start, flipped in itertools.product(
            sizes.items(),
            _get_crop_starts(info, limits, augmentations.clips_per_video),
            (False, True)[: 1 + augmentations.flips],
        ):
            smaller_name = f"~{size.h}x{size.w}" if size_limits is not limits else ""
            name = f"{info.name}@{start}{smaller_name}" + "~flipped" * flipped
            clip_views.append(View(name, number, start, size_limits, size, flipped))
    return clip_views


def _get_crop_starts(info: ClipInfo, limits: SizeLimits, max_crops: int) -> list[int]:
    spare = count_sampled_frames(info, limits) - fit_size(info, limits).t
    count = min(max_crops, spare + 1)
    return sorted({round(spare * index / max(1, count - 1)) for index in range(count)})


def draw_view_masks(
    masks: Sequence[MaskGenerator], canvases: Sequence[ClipCanvas], views: Sequence[View]
) -> list[dict[int, IsKnown]]:
    """Return the known pixels by a mask of each kind for every view of some canvases, a function of the view's name.

    Nothing is known in a view whose size has no mask of a kind.
    """
    drawn: list[dict[int, IsKnown]] = []
    for kind, mask in enumerate(masks):
        drawn.append({})
        for slot in (slot for canvas in canvases for slot in canvas.slots):
            view = views[slot.clip]
            generated = mask.draw(make_generator(kind, "mask of a view", zlib.crc32(view.name.encode())), view.size)
            drawn[-1][slot.clip] = np.zeros(view.size, bool) if generated is None else ~generated
    return drawn


def place_masks(
    shape: tuple[int, ...], canvases: Sequence[ClipCanvas], masks: dict[int, IsKnown]
) -> Bool[np.ndarray, "B T H W"]:
    """Return the masks of views at their places on canvases, in an array of a batch's shape."""
    placed = np.zeros(shape, bool)
    for row, canvas in enumerate(canvases):
        for clip, top, left in canvas.slots:
            t, h, w = masks[clip].shape
            placed[row, :t, top : top + h, left : left + w] = masks[clip]
    return placed


def make_mask_values(
    latents: Sequence[Float32[np.ndarray, "t h w c"]], masks: Sequence[IsKnown], stride: Grid
) -> dict[str, np.ndarray]:
    """Return the fields of a view: for each kind of mask its latents, zero if nothing is known, and its shares."""
    values = dict[str, np.ndarray]()
    for kind, (kind_latents, mask) in enumerate(zip(latents, masks, strict=True)):
        pair = make_mask_fields(channels=kind_latents.shape[-1], temporal_stride=stride.t, kind=kind)
        arrays = kind_latents if mask.any() else np.zeros_like(kind_latents), fold_mask(mask, stride)
        values |= {field.name: array for field, array in zip(pair, arrays, strict=True)}
    return values
