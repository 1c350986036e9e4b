"""Encode the clips of `support.offline_clips` into the folder `sys.argv[1]`, printing the number that are done.

At the number `sys.argv[2]` the program waits to be killed. At its end it prints the number of its devices.
"""

import sys
import time
from pathlib import Path

import jax

from dit_video.data.latents.offline import encode_latents
from dit_video.data.latents.plan import plan_encoding
from support.offline_clips import MIXED_SIZES, make_encoding, make_source


def main(folder: Path, last: int) -> None:
    """Encode the clips, or wait."""
    source, encoding = make_source(MIXED_SIZES), make_encoding(views_per_file=3)

    def progress(done: int) -> None:
        print(done, flush=True)
        if done == last:
            time.sleep(600)

    encode_latents(folder, source, encoding, plan_encoding(source, encoding), identity="a", progress=progress)
    print("devices", jax.local_device_count())


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
