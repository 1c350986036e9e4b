"""Decode a stream of `sys.argv[1]` frames, and print the peak memory of this process."""

import resource
import sys

import jax
import numpy as np

from dit_video.models.autoencoders import CausalVaeConfig, decode_stream
from dit_video.nn import init_params


def main(frame_count: int) -> None:
    """Decode random latents."""
    config = CausalVaeConfig(channels=4, width=16, multipliers=(1, 2, 2, 2), blocks=1)
    params = init_params(config.make, jax.random.key(0))
    latents = np.random.default_rng(0).normal(size=(1, 1 + (frame_count - 1) // 4, 8, 12, 4)).astype(np.float32)
    count = sum(frames.shape[1] for frames in decode_stream(config, params, [latents]))
    assert count == frame_count, count
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


if __name__ == "__main__":
    main(int(sys.argv[1]))
