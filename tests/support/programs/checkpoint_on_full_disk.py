"""Save a checkpoint, and another one that the system refuses to write; the argument is the folder."""

import resource
import sys

import jax.numpy as jnp
import numpy as np

from dit_video.core.errors import UserError
from dit_video.training.checkpoint import CheckpointPolicy, Checkpoints

state = {"x": jnp.asarray(np.random.default_rng(0).normal(size=200_000))}
checkpoints = Checkpoints(sys.argv[1], keep=CheckpointPolicy(newest=1))
checkpoints.save(1, state, {})
checkpoints.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try:
    checkpoints.save(2, state, {})
    checkpoints.wait()
except UserError as error:
    print("error:", error)
