"""Embeddings by CLIP, and what is read from them: an aesthetic score, and how well captions describe a clip."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np
import pyarrow as pa
from flax import nnx
from jaxtyping import Float32

from dit_video.core.errors import UserError
from dit_video.core.pixels import resize
from dit_video.curation.aesthetic import AestheticHead, load_aesthetic_head
from dit_video.curation.annotator import Annotator, ClipFile, Column
from dit_video.models.encoders import PretrainedTokenizer
from dit_video.models.features import FrameEncoder
from dit_video.nn import get_graph_def
from dit_video.weights import load_clip_image_processor, load_clip_text, load_clip_vision
from dit_video.weights.text_encoders import find_tokenizer_folder

THUMBNAIL_SIDE = 16
"""Height and width of thumbnails, by which copies are told from second takes."""


@dataclass(frozen=True, kw_only=True)
class ClipScores(Annotator):
    """CLIP's embedding of a clip, its aesthetic score, and the cosine of frames and captions (arXiv 2103.00020)."""

    threads: ClassVar[int] = 2

    folder: str = "weights/clip"
    """Folder of a `CLIPModel` of `transformers` with its tokenizer and image settings, such as
    `openai/clip-vit-large-patch14`, which LAION's aesthetic heads are for."""
    aesthetic: str = ""
    """File of an aesthetic head; empty for none."""
    frames: int = 8
    """Maximum number of frames of a clip, at even spacing."""

    @property
    def name(self) -> str:
        return "clip"

    @property
    def columns(self) -> Mapping[str, Column]:
        shape = pa.list_(pa.float16(), self._model.width)
        mirrored = "Mean of its frames' and mirrored frames' embeddings, of length 1"
        columns = {
            "embedding": Column(type=shape, description=f"CLIP's embedding of the clip. {mirrored}."),
            "text_match": Column(
                type=pa.float32(), description="Mean cosine of frames and captions; that of the best of several."
            ),
        }
        side = THUMBNAIL_SIDE
        columns["thumbnails"] = Column(
            # Lists of 4,096 values would pass 32-bit offsets at 524,288 clips.
            type=pa.large_binary(),
            description=f"Luma of twice as many frames, a byte a pixel of {side}×{side}.",
        )
        if self.aesthetic:
            columns["aesthetic"] = Column(type=pa.float32(), description="Mean aesthetic score of frames.")
        return columns

    @property
    def identity(self) -> str:
        return f"clip 2, {self._model.digest}, {self.frames} frames"

    @property
    def reads_captions(self) -> bool:
        return True

    def check(self) -> None:
        model = self._model
        if model.head is not None and model.head.width != model.width:
            raise UserError(
                f"aesthetic={self.aesthetic} is invalid: it reads embeddings of {model.head.width} numbers, and the "
                f"CLIP in {self.folder} makes {model.width}. Use the head of this CLIP"
            )

    def annotate(self, clip: ClipFile) -> Mapping[str, Any]:
        model, dense = self._model, clip.decode_frames(2 * self.frames).frames
        frames = dense[:: max(1, round(len(dense) / self.frames))]
        embeddings = normalize(model.encode_frames(frames))
        mirrored = normalize(model.encode_frames(np.ascontiguousarray(frames[:, :, ::-1])))
        mean = normalize((embeddings + mirrored).mean(axis=0))
        luma = resize(dense, THUMBNAIL_SIDE, THUMBNAIL_SIDE) @ np.array([0.299, 0.587, 0.114], np.float32)
        thumbnails = np.rint(luma).astype(np.uint8).tobytes()
        values: dict[str, Any] = {
            "embedding": mean.astype(np.float16),
            "thumbnails": thumbnails,
            "text_match": None,
        }
        if clip.info.captions:
            texts = np.stack([model.encode_text(text) for text in clip.info.captions])
            values["text_match"] = float((embeddings @ texts.T).mean(axis=0).max())
        if model.head is not None:
            values["aesthetic"] = float(model.head(embeddings).mean(axis=0))
        return values

    @functools.cached_property
    def _model(self) -> "_OpenModel":
        return _open(self)


@dataclass(frozen=True)
class _OpenModel:
    encode_frames: FrameEncoder
    encode_text: Callable[[str], Float32[np.ndarray, " P"]]
    head: AestheticHead | None
    width: int
    digest: str


def normalize(rows: Float32[np.ndarray, "*n P"]) -> Float32[np.ndarray, "*n P"]:
    """Return vectors of length 1."""
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)


def _open(config: ClipScores) -> _OpenModel:
    folder = config.folder
    vision, text = load_clip_vision(folder), load_clip_text(folder)
    if text.config.projection is None or text.config.projection != vision.config.projection:
        raise UserError(f"folder={folder} is invalid: its towers have no projection to one space. Use a CLIPModel")
    positions = text.config.positions
    tokenize = PretrainedTokenizer(find_tokenizer_folder(Path(folder)), max_tokens=positions)
    head = load_aesthetic_head(config.aesthetic) if config.aesthetic else None
    graph = get_graph_def(text.config.make)
    embed = jax.jit(lambda params, ids, mask: nnx.merge(graph, params)(ids, mask).projected)

    @functools.lru_cache(maxsize=4096)
    def encode_text(caption: str) -> Float32[np.ndarray, " P"]:
        tokens = tokenize(caption)
        ids, mask = np.zeros((2, 1, positions), np.int32)
        ids[0, : len(tokens)], mask[0, : len(tokens)] = tokens, 1
        return normalize(np.asarray(embed(text.params, ids, mask), np.float32)[0])

    encode_frames = FrameEncoder(vision.config, vision.params, load_clip_image_processor(folder))
    digest = f"{vision.digest[:16]} {text.digest[:16]} {tokenize.identity[:16]}"
    digest += f", aesthetic {head.digest[:16]}" if head else ""
    return _OpenModel(encode_frames, encode_text, head, text.config.projection, digest)
