"""What stands for a tokenizer, a frozen text encoder and an autoencoder, where only sizes and places matter."""

import hashlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from dit_video import text
from dit_video.encoders import text as text_encoder


def tokenize(caption: str) -> np.ndarray:
    return np.frombuffer(caption.encode(), np.uint8).astype(np.int32) + 3


def pooled(clips):
    """Stands for an autoencoder of stride 4x8x8: the mean of every patch, the first frame for itself."""
    return [
        np.concatenate([clip[:1], clip[1:].reshape(-1, 4, *clip.shape[1:]).mean(1)])
        .reshape(1 + len(clip) // 4, clip.shape[1] // 8, 8, clip.shape[2] // 8, 8, 3)
        .mean((2, 4))
        .astype(np.float32)
        for clip in clips
    ]


def use_embedder(patch):
    """Open the stand-in instead of a pretrained encoder; returns a list of those that were opened."""
    opened = []

    def load(folder, **options):
        opened.append(Embedder(folder, **options))
        return opened[-1]

    patch.setattr(text_encoder, "load_embedder", load)
    patch.setattr(text_encoder, "read_text_encoder_config", lambda _folder: SimpleNamespace(width=Embedder.width))
    return opened


class Embedder(text.Embedder):
    """Stands for a frozen text encoder: a vector for each word and one for the end, whatever the words beside it."""

    width = 8

    def __init__(self, folder, *, max_tokens=512, cleaned=False, dtype="float32", cache=None):
        self.seed = (Path(folder) / "seed.txt").read_text()
        self.identity = hashlib.sha256(f"{self.seed} {max_tokens} {cleaned} {dtype}".encode()).hexdigest()[:16]
        self.max_tokens, self.cache = max_tokens, cache
        self.asked = []

    def __call__(self, text):
        return self.embed_many([text])[0]

    def embed_many(self, texts):
        self.asked += texts
        return [np.stack([self.vector(word) for word in [*text.split(), ""][-self.max_tokens :]]) for text in texts]

    def vector(self, word):
        seed = hashlib.sha256(f"{self.seed} {word}".encode()).digest()[:8]
        return np.random.default_rng(list(seed)).standard_normal(self.width, np.float32)
