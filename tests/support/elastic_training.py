"""A training that continues from its checkpoints on any mesh, with the batches of `denoiser_loss`."""

import functools
from pathlib import Path

import jax
from jax.sharding import Mesh

from dit_video.distributed import ShardingRules, make_shardings, shard_batch
from dit_video.training.checkpoint import CheckpointPolicy, Checkpoints
from dit_video.training.optim.optimizer import AdamW
from dit_video.training.optim.schedules import Constant
from support.denoiser_loss import LOSS, PARAMS, make_rows
from support.training_state import create_state, get_state_shapes, make_step

OPTIMIZER = AdamW(learning_rate=1e-2, schedule=Constant(warmup=0)).make(steps=10)

RULES = ShardingRules(min_size=1)


def init(key):
    """Return the parameters of a new run, which are the same for all keys."""
    return PARAMS


def make_local_rows(step: int):
    """Make the rows of a step that belong to this process."""
    count = 8 // jax.process_count()
    return jax.tree.map(lambda leaf: leaf[jax.process_index() * count :][:count], make_rows(13 * step))


def train(folder: Path, mesh: Mesh, steps: int, *, rules: ShardingRules = RULES) -> list[list[float]]:
    """Continue from the checkpoint in a folder for so many steps; return their losses and gradient norms."""
    layout = functools.partial(make_shardings, mesh=mesh, rules=rules)
    checkpoints = Checkpoints(folder, keep=CheckpointPolicy(newest=9))
    if checkpoints.latest() is None:
        state = create_state(init, OPTIMIZER, jax.random.key(0), shardings=layout)
    else:
        state, _ = checkpoints.restore(get_state_shapes(init, OPTIMIZER, shardings=layout))
    step = make_step(LOSS, OPTIMIZER, ema_decay=0.9)
    history = []
    for _ in range(steps):
        state, figures = step(state, shard_batch(make_local_rows(int(state.step)), mesh))
        history.append([float(figures["loss"]), float(figures["gradient_norm"])])
    checkpoints.save(int(state.step), state, {})
    checkpoints.wait()
    return history
