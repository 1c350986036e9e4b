"""Random clips of several sizes and the config of an autoencoder, for online encoding."""

import numpy as np

from dit_video.models.autoencoders import PatchVaeConfig
from dit_video.tokens import Grid

CONFIG = PatchVaeConfig(stride=Grid(2, 4, 4), channels=3, width=8, blocks=1)
SIZES = [Grid(t, 4 * h, 4 * w) for t in (1, 3, 5) for h in (2, 3) for w in (2, 4)]


def make_clips() -> list[np.ndarray]:
    """Return nine clips whose sizes are among `SIZES`."""
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (*SIZES[index], 3), np.uint8) for index in generator.integers(0, 12, 9)]
