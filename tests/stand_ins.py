"""What stands for a tokenizer and an autoencoder, where only their sizes and places matter."""

import numpy as np


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
