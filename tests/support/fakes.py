"""Fakes of a tokenizer, a frozen text encoder and an autoencoder, for tests in which only sizes and places matter."""

import hashlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from dit_video.models import encoders
from dit_video.weights import frozen_encoders as text_encoder


def tokenize(caption: str) -> np.ndarray:
    """Return an id for each byte."""
    return np.frombuffer(caption.encode(), np.uint8).astype(np.int32) + 3


def average_patches(clips):
    """Encode like an autoencoder of stride 4x8x8: to the mean of every patch, with the first frame by itself."""
    return [
        np.concatenate([clip[:1], clip[1:].reshape(-1, 4, *clip.shape[1:]).mean(1)])
        .reshape(1 + len(clip) // 4, clip.shape[1] // 8, 8, clip.shape[2] // 8, 8, 3)
        .mean((2, 4))
        .astype(np.float32)
        for clip in clips
    ]


def use_fake_embedder(patch):
    """Open the fake instead of a pretrained encoder, and return a list that collects those that were opened."""
    opened = []

    def load(folder, **options):
        opened.append(FakeEmbedder(folder, **options))
        return opened[-1]

    patch.setattr(text_encoder, "load_embedder", load)
    patch.setattr(text_encoder, "read_text_encoder_config", lambda _folder: SimpleNamespace(width=FakeEmbedder.width))
    return opened


class FakeEmbedder(encoders.Embedder):
    """A text encoder without context: it returns a vector for each word, and one for the end."""

    width = 8

    def __init__(self, folder, *, max_tokens=512, cleaned=False, dtype="float32", cache=None, **options):
        self.seed = (Path(folder) / "seed.txt").read_text()
        self.identity = hashlib.sha256(f"{self.seed} {max_tokens} {cleaned} {dtype}".encode()).hexdigest()[:16]
        self.max_tokens, self.cache = max_tokens, cache
        self.texts = []

    def __call__(self, text):
        return self.embed_many([text])[0]

    def count_tokens(self, text):
        return len([*text.split(), ""][-self.max_tokens :])

    def embed_many(self, texts):
        self.texts += texts
        return [np.stack([self.vector(word) for word in [*text.split(), ""][-self.max_tokens :]]) for text in texts]

    def vector(self, word):
        seed = hashlib.sha256(f"{self.seed} {word}".encode()).digest()[:8]
        return np.random.default_rng(list(seed)).standard_normal(self.width, np.float32)
