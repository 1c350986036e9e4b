"""Plan of an encoding: the views of clips, the canvases that they share, their files, and what they depend on."""

import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float32, Int64

from dit_video.core import config_json
from dit_video.core.errors import UserError, check_at_least
from dit_video.core.storage import StoragePathLike, to_storage_path
from dit_video.data.clips import ClipSource
from dit_video.data.latents.cache import LatentSource, StorageDtype
from dit_video.data.latents.codec import compute_autoencoder_identity
from dit_video.data.latents.views import Augmentations, View, list_views
from dit_video.data.latents.writer import read_encoded
from dit_video.data.sizes import SizeLimits
from dit_video.data.tables import compute_row_id
from dit_video.models.autoencoders import AutoencoderConfig, ClipCanvas, compute_padding_share, pack_canvases
from dit_video.models.autoencoders.canvas import CANVAS_PIXELS
from dit_video.models.conditioning import COND_LATENTS, IMAGE_TOKENS, ClipConditioning, MaskGenerator, make_mask_fields
from dit_video.tokens import Field
from dit_video.weights.image_encoder import FrozenImageEncoder

EncodeText = Callable[[str], Float32[np.ndarray, "s e"]]
_CAPTIONS_PER_FILE = 4096
"""Number of captions in a file of embeddings alone. One may take 8 MB."""


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


def check_clips(latents: LatentSource, clips: ClipSource) -> None:
    """Check that latents are those of some clips, with the captions that these have now.

    The views of a clip are not compared: they follow from the clip and from the identity of the latents.

    Raises:
      UserError: they are of other clips, or captions have changed.
    """
    names, payloads = (pa.array(clips.column(name), pa.string()) for name in ("name", "payload"))
    keys, own_keys = pc.binary_join_element_wise(names, payloads, "\0"), latents.clip_keys
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
            f"{is_changed.sum()} examples have changed, such as {first}). Encode the clips again into this folder with "
            "tools/encode_latents.py, which encodes what is new alone."
        )


def _hash_captions(captions: Sequence[tuple[str, ...]]) -> Int64[np.ndarray, " n"]:
    return np.fromiter(map(hash, captions), np.int64, len(captions))
