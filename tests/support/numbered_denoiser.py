"""A denoiser of some hundred megabytes whose parameters are the numbers of their layers."""

import numpy as np

from dit_video.models.backbones.wan import WanDitConfig

CONFIG = WanDitConfig(channels=4, context_width=64, width=1024, mlp_dim=4096, layers=6, heads=8, time_width=32)


def make_numbers(path: str, leaf) -> np.ndarray:
    """Return values that differ between layers and that bfloat16 holds exactly."""
    first = np.arange(1, leaf.shape[0] + 1) if path.startswith("blocks/") else np.ones(1)
    return np.broadcast_to((first % 200).reshape(-1, *[1] * (len(leaf.shape) - 1)), leaf.shape).astype(np.float32)
