"""Compare three steps of an autoencoder against a discriminator on eight devices with those on one."""

import dataclasses
import functools

import jax
import numpy as np

from dit_video.distributed import Parallelism, ShardingRules, make_mesh, make_shardings, shard_batch
from dit_video.training.state import make_on_devices
from support.adversarial_game import CLIPS, LECAM, init_game, make_game_step

CONFIG = dataclasses.replace(LECAM, start_step=0)
FIGURES = ("loss", "discriminator", "penalty", "adversarial_weight")


def train(mesh) -> tuple[np.ndarray, int]:
    """Return the figures of three steps, and the number of sharded arrays of the discriminator."""
    layout = functools.partial(make_shardings, mesh=mesh, rules=ShardingRules(min_size=64))
    state = make_on_devices(lambda key: init_game(CONFIG), jax.random.key(0), shardings=layout)
    num_sharded = sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.discriminator))
    clips, history = shard_batch(np.concatenate([CLIPS] * 4), mesh), []
    for _ in range(3):
        state, figures = make_game_step(CONFIG)(state, clips)
        history.append([float(figures[name]) for name in FIGURES])
    return np.array(history), num_sharded


def main() -> None:
    """Train on one device and on eight."""
    assert jax.device_count() == 8
    expected, num_sharded = train(make_mesh(Parallelism(), jax.devices()[:1]))
    assert num_sharded == 0
    assert expected[2, 2] > 0
    actual, num_sharded = train(make_mesh(Parallelism(data=2, fsdp=4)))
    assert num_sharded >= 4, num_sharded
    np.testing.assert_allclose(actual, expected, rtol=1e-4)
    print("done")


if __name__ == "__main__":
    main()
