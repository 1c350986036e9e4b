"""Configs of small autoencoders that encode and decode in chunks, and the comparison of their frames."""

import numpy as np

from dit_video.models.autoencoders import CausalVaeConfig, PatchVaeConfig
from dit_video.tokens import Grid

CONFIGS = {
    "patches": PatchVaeConfig(stride=Grid(2, 4, 4), channels=3, width=8, blocks=1),
    "preactivated patches": PatchVaeConfig(stride=Grid(2, 4, 4), channels=3, width=8, blocks=1, preactivated=True),
    "patches with finer levels": PatchVaeConfig(
        stride=Grid(2, 4, 4), channels=3, width=8, blocks=1, fine_widths=(6, 5)
    ),
    "levels": CausalVaeConfig(
        channels=3, width=4, multipliers=(1, 2, 2), factors=(Grid(1, 2, 2), Grid(2, 2, 2)), blocks=1
    ),
}


def assert_frames_are_close(left: np.ndarray, right: np.ndarray) -> None:
    """Assert that uint8 frames differ by at most one, because of rounding, in less than 1 % of the values."""
    assert left.shape == right.shape
    difference = np.abs(left.astype(int) - right)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01
