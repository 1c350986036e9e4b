"""Compare three steps of a model with a codebook on eight devices with those on one."""

import functools

import jax
import numpy as np

from dit_video.core.trees import flatten
from dit_video.distributed import Parallelism, ShardingRules, make_mesh, make_shardings, shard_batch
from dit_video.training.losses.autoencoder import AutoencoderStep
from dit_video.training.state import make_on_devices
from support.codebook_model import AVERAGES, CLIPS, OPTIMIZER, init, make_loss

LOSS = make_loss(AVERAGES)
TRAIN_STEP = AutoencoderStep(loss=LOSS, optimizer=OPTIMIZER, ema_decay=0.9)
STEP = TRAIN_STEP.compile()


def train(mesh):
    """Return the state of the codebook, the figures of three steps, and True if the state is sharded."""
    layout = functools.partial(make_shardings, mesh=mesh, rules=ShardingRules(min_size=1))
    state = make_on_devices(lambda key: TRAIN_STEP.init(init(key)), jax.random.key(0), shardings=layout)
    is_sharded = not state.extra["codebook"]["sums"].sharding.is_fully_replicated
    history = []
    for _ in range(3):
        state, figures = STEP(state, shard_batch(CLIPS, mesh))
        history.append([float(figures[name]) for name in ("loss", "usage", "perplexity", "restarts")])
    return jax.device_get(flatten(state.extra)), np.asarray(history), is_sharded


def main() -> None:
    """Train on one device and on eight."""
    assert jax.device_count() == 8
    expected, expected_history, is_sharded = train(make_mesh(Parallelism(), jax.devices()[:1]))
    assert not is_sharded
    assert expected_history[0, 3] == 15
    actual, history, is_sharded = train(make_mesh(Parallelism(data=2, fsdp=4)))
    assert is_sharded
    np.testing.assert_allclose(history, expected_history, rtol=1e-4)
    for path, leaf in expected.items():
        np.testing.assert_allclose(actual[path], leaf, rtol=1e-3, atol=1e-4, err_msg=path)
    print("done")


if __name__ == "__main__":
    main()
