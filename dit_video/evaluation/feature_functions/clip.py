"""Embeddings of frames and texts by CLIP, whose cosine measures how well a frame fits a text."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float32

from dit_video.core.errors import UserError
from dit_video.evaluation.feature_functions.feature_function import FeatureFunction, OpenFeatures
from dit_video.models.encoders import PretrainedTokenizer
from dit_video.models.features import FrameEncoder
from dit_video.nn import get_graph_def
from dit_video.video import Clip
from dit_video.weights import load_clip_image_processor, load_clip_text, load_clip_vision
from dit_video.weights.embedders import find_tokenizer_folder

EmbedTexts = Callable[[Sequence[str]], Float32[np.ndarray, "n P"]]
_TEXTS = 16
"""Number of texts that are embedded at once."""


@dataclass(frozen=True, kw_only=True)
class ClipEmbeddings(FeatureFunction):
    """The projected embeddings of CLIP, of length 1: one of every frame (arXiv 2103.00020)."""

    folder: str = "weights/clip"
    """Folder of a `CLIPModel` of `transformers` with its tokenizer and image settings, such as
    `openai/clip-vit-base-patch32`."""

    def load(self) -> OpenFeatures:
        """Read the vision tower."""
        tower = load_clip_vision(self.folder)
        encode = FrameEncoder(tower.config, tower.params, load_clip_image_processor(self.folder))

        def extract(clips: Sequence[Clip]) -> Float32[np.ndarray, "n d"]:
            return _normalize(np.concatenate([encode(clip.frames) for clip in clips]))

        return OpenFeatures(extract, f"CLIP {tower.digest[:12]}", is_of_frames=True)

    def open_texts(self) -> EmbedTexts:
        """Return the function from texts to embeddings of length 1.

        Raises:
          MissingError: the folder lacks the text tower or the tokenizer.
          UserError: the text tower has no projection.
        """
        return _load_texts(self)


@functools.cache
def _load_texts(config: ClipEmbeddings) -> EmbedTexts:
    tower = load_clip_text(config.folder)
    if tower.config.projection is None:
        raise UserError(f"folder={config.folder} is invalid: its text tower has no projection. Use a CLIPModel")
    positions = tower.config.positions
    tokenize = PretrainedTokenizer(find_tokenizer_folder(Path(config.folder)), max_tokens=positions)
    graph = get_graph_def(tower.config.make)
    encode = jax.jit(lambda params, ids, mask: nnx.merge(graph, params)(ids, mask).projected)

    def embed(texts: Sequence[str]) -> Float32[np.ndarray, "n P"]:
        rows = []
        for start in range(0, len(texts), _TEXTS):
            part = [tokenize(text) for text in texts[start : start + _TEXTS]]
            ids, mask = np.zeros((2, _TEXTS, positions), np.int32)
            for row, tokens in enumerate(part):
                ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
            rows.append(np.asarray(encode(tower.params, ids, mask), np.float32)[: len(part)])
        return _normalize(np.concatenate(rows))

    return embed


def _normalize(rows: Float32[np.ndarray, "n d"]) -> Float32[np.ndarray, "n d"]:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)
