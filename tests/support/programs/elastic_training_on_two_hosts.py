"""Take the middle two steps of a training with two processes of four devices each; the argument is the folder."""

import sys
from pathlib import Path

import jax
import numpy as np

from dit_video.distributed import Parallelism, make_mesh
from support.devices import join_processes


def main() -> None:
    """Join the processes and train."""
    join_processes()
    # Its parameters are arrays, which JAX has to make after the processes are joined.
    from support.elastic_training import train

    assert jax.device_count() == 8
    assert jax.process_count() == 2
    folder = Path(sys.argv[1])
    actual = train(folder / "parts", make_mesh(Parallelism(data=2, fsdp=4)), 2)
    np.testing.assert_allclose(actual, np.load(folder / "expected.npy")[2:4], rtol=1e-6)
    print("done")


if __name__ == "__main__":
    main()
