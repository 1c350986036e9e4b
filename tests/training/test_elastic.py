"""A run that goes on with other devices, another mesh or other hosts has the losses that it would have had."""

from pathlib import Path

import pytest

from support.devices import check_on_eight_devices, run_together

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]

SHARED = """
    import importlib.util, sys
    import jax, jax.numpy as jnp, numpy as np
    from dit_video.distributed import MeshConfig, ShardingRules, make_mesh, shard_batch, shardings
    from dit_video.training.checkpoint import Checkpoints
    from dit_video.training.checkpoint_policy import Keep
    from dit_video.training.optim.optimizer import OptimizerConfig, make_optimizer
    from dit_video.training.state import new_state, state_shapes
    from dit_video.training.step import make_step

    spec = importlib.util.spec_from_file_location("shared", sys.argv[1])
    shared = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(shared)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup=0), steps=10)
    sizes = [shared.A, shared.B, shared.C]
    init = lambda key: shared.PARAMS

    def rows(step):
        items = [sizes[index % 3]._replace(example=13 * step + index) for index in range(13)]
        return shared.batch(items[:2], items[2:4], items[4:5], [], items[5:8], items[8:9], items[9:11], items[11:13])

    def share(step):
        # of this process
        count = 8 // jax.process_count()
        return jax.tree.map(lambda leaf: leaf[jax.process_index() * count:][:count], rows(step))

    def train(folder, mesh, steps):
        # Go on from what the folder holds, for so many steps; gives their losses and gradient norms.
        layout = lambda tree: shardings(tree, mesh, ShardingRules(minimum=1))
        checkpoints = Checkpoints(folder, keep=Keep(newest=9))
        if checkpoints.latest() is None:
            state = new_state(init, optimizer, jax.random.key(0), shardings=layout)
        else:
            state, _ = checkpoints.restore(state_shapes(init, optimizer, shardings=layout))
        step = make_step(shared.LOSS, optimizer, ema_decay=0.9)
        found = []
        for _ in range(steps):
            state, figures = step(state, shard_batch(share(int(state.step)), mesh))
            found.append([float(figures["loss"]), float(figures["gradient_norm"])])
        checkpoints.save(int(state.step), state, {})
        checkpoints.wait()
        return found
"""

ON_EIGHT_DEVICES = (
    SHARED
    + """
    devices, folder = jax.devices(), sys.argv[2]
    expected = train(folder + "/whole", make_mesh(MeshConfig(), devices[:1]), 8)
    assert np.ptp(np.asarray(expected)[:, 0]) > 1e-3, expected
    found = []
    for mesh in (
        make_mesh(MeshConfig(), devices[:1]),
        make_mesh(MeshConfig(), devices[:2]),
        make_mesh(MeshConfig(data=2, fsdp=2), devices[:4]),
        make_mesh(MeshConfig(data=1, fsdp=8), devices),
    ):
        found += train(folder + "/parts", mesh, 2)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    print("done")
"""
)

ALONE = (
    SHARED
    + """
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    np.save(sys.argv[2] + "/expected.npy", train(sys.argv[2] + "/whole", mesh, 6))
    train(sys.argv[2] + "/parts", mesh, 2)
    print("done")
"""
)

TOGETHER = """
    assert jax.device_count() == 8 and jax.process_count() == 2
    found = train(sys.argv[2] + "/parts", make_mesh(MeshConfig(data=2, fsdp=4)), 2)
    expected = np.load(sys.argv[2] + "/expected.npy")
    np.testing.assert_allclose(found, expected[2:4], rtol=1e-6)
    print("done")
"""

AFTERWARDS = (
    SHARED
    + """
    found = train(sys.argv[2] + "/parts", make_mesh(MeshConfig(fsdp=2, data=-1)), 2)
    expected = np.load(sys.argv[2] + "/expected.npy")
    np.testing.assert_allclose(found, expected[4:], rtol=1e-6)
    print("done")
"""
)

LOSS = str(Path(__file__).with_name("losses") / "test_denoiser.py")


def test_on_one_two_four_and_eight_devices(tmp_path):
    check_on_eight_devices(ON_EIGHT_DEVICES, LOSS, str(tmp_path))


def test_on_one_host_two_hosts_and_one(tmp_path):
    check_on_eight_devices(ALONE, LOSS, str(tmp_path))
    outputs = run_together("import jax", SHARED + TOGETHER, LOSS, str(tmp_path), devices=4)
    assert all("done" in output for output in outputs)
    check_on_eight_devices(AFTERWARDS, LOSS, str(tmp_path))
