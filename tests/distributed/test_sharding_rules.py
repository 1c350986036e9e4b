import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dit_video.core.errors import UserError
from dit_video.distributed import MeshConfig, ShardingRules, make_mesh, make_shardings, shard_batch
from support.devices import check_on_eight_devices, run_together


def test_layouts_on_eight_devices_follow_the_rules():
    check_on_eight_devices("sharding_layouts.py")


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_two_processes_give_one_global_batch():
    for output in run_together("global_batches.py", devices=2):
        assert "done" in output, output


def test_one_device_shards_nothing():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    leaf = jax.ShapeDtypeStruct((512, 512), np.float32)
    assert make_shardings({"kernel": leaf}, mesh)["kernel"].spec == PartitionSpec()
    batch = (np.ones((3, 2)), {"y": np.zeros(3)})
    placed = shard_batch(batch, mesh)
    assert jax.tree.structure(placed) == jax.tree.structure(batch)


def test_rules_that_cannot_apply_are_refused():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    leaf = {"bias": jax.ShapeDtypeStruct((8,), np.float32)}
    with pytest.raises(UserError, match="names model; the mesh has data, fsdp, tensor, context"):
        make_shardings(leaf, mesh, ShardingRules(rules=(("bias", ("model",)),)))
    with pytest.raises(UserError, match=r"has 2 axes, bias has 1\. Put a rule for bias before it"):
        make_shardings(leaf, mesh, ShardingRules(rules=(("bias", (None, "fsdp")),)))
