"""Compare the losses of three steps of a denoiser on eight devices with those on one."""

import functools

import jax
import numpy as np

from dit_video.distributed import Parallelism, ShardingRules, make_mesh, make_shardings, shard_batch
from dit_video.training.optim.optimizer import AdamW
from dit_video.training.optim.schedules import Constant
from support.denoiser_loss import LOSS, PARAMS, make_rows
from support.training_state import create_state, make_step

OPTIMIZER = AdamW(learning_rate=1e-2, schedule=Constant(warmup=0)).make(steps=10)
STEP = make_step(LOSS, OPTIMIZER, ema_decay=0.9)


def train(mesh) -> tuple[np.ndarray, int]:
    """Return losses and gradient norms of three steps, and the number of sharded arrays."""
    layout = functools.partial(make_shardings, mesh=mesh, rules=ShardingRules(min_size=1))
    state = create_state(lambda key: PARAMS, OPTIMIZER, jax.random.key(0), shardings=layout)
    num_sharded = sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state))
    history = []
    for start in (0, 13, 26):
        state, figures = STEP(state, shard_batch(make_rows(start), mesh))
        history.append([float(figures["loss"]), float(figures["gradient_norm"])])
    return np.asarray(history), num_sharded


def main() -> None:
    """Train on one device and on eight."""
    assert jax.device_count() == 8
    expected, num_sharded = train(make_mesh(Parallelism(), jax.devices()[:1]))
    assert num_sharded == 0
    assert np.ptp(expected[:, 0]) > 1e-3, expected
    actual, num_sharded = train(make_mesh(Parallelism(data=2, fsdp=4)))
    assert num_sharded > 20
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
    print("done")


if __name__ == "__main__":
    main()
