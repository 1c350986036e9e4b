"""Save checkpoints to a disk on which none can be finished; the arguments are the folder and the system's error."""

import os
import sys

import jax.numpy as jnp

from dit_video.core import storage
from dit_video.core.errors import script
from dit_video.training.checkpoint import Checkpoints

storage.RETRY_SECONDS = (0.01,)


def fail(*_, **__):
    """Raise the error."""
    raise OSError(int(sys.argv[2]), os.strerror(int(sys.argv[2])))


@script
def main() -> None:
    """Save, and wait."""
    checkpoints = Checkpoints(sys.argv[1])
    state = {"x": jnp.arange(10.0)}
    checkpoints.save(1, state, {})
    checkpoints.wait()
    os.rename = fail
    checkpoints.save(2, state, {})
    checkpoints.wait()


main()
