"""Encode the clips of `support.online_clips` on three devices, and save their latents in the file `sys.argv[1]`."""

import sys

import numpy as np

from dit_video.data.latents.online import CanvasEncoder, OnlineEncoder
from support.online_clips import CONFIG, SIZES, make_clips
from support.random_params import make_random_params


def main(path: str) -> None:
    """Encode the clips, and check that every batch is split over the devices."""
    device_counts = set()
    encode = CanvasEncoder.__call__

    def encode_and_count(*arguments, **options):
        latents = encode(*arguments, **options)
        device_counts.add(len(latents.sharding.device_set))
        return latents

    CanvasEncoder.__call__ = encode_and_count
    encoder = OnlineEncoder(CONFIG, make_random_params(CONFIG.make), SIZES)
    assert set(encoder.batch_sizes.values()) == {3}, encoder.batch_sizes
    np.savez(path, *encoder(make_clips()))
    assert device_counts == {3}, device_counts


if __name__ == "__main__":
    main(sys.argv[1])
