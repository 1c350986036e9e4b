import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dit_video.core.errors import UserError
from dit_video.distributed import MeshConfig, ShardingRules, make_mesh, make_shardings, shard_batch
from support.devices import check_on_eight_devices, run_together


def test_layouts_on_eight_devices():
    code = """
        import jax, jax.numpy as jnp, numpy as np, optax
        from jax.sharding import PartitionSpec as P
        from dit_video.core import trees as trees
        from dit_video.distributed import MeshConfig, ShardingRules, batch_sharding, make_mesh, row_shards
        from dit_video.distributed import shard_batch, shardings
        from dit_video.core.errors import UserError

        mesh = make_mesh(MeshConfig(fsdp=4))
        assert dict(mesh.shape) == {"data": 2, "fsdp": 4, "tensor": 1, "context": 1}
        assert row_shards(mesh) == 8
        assert row_shards(make_mesh(MeshConfig(fsdp=2, tensor=2))) == 4
        params = {
            "embed": {"kernel": jnp.ones((16, 256)), "bias": jnp.zeros((256,))},
            "blocks": {
                "up": {"kernel": jnp.ones((12, 8, 64))},
                "odd": jnp.ones((400, 7, 9)),
                "square": jnp.ones((4, 64, 64)),
            },
        }
        specs = lambda tree: {path: leaf.spec for path, leaf in trees.flatten(tree).items()}
        rules = ShardingRules(minimum=1024)
        found = specs(shardings(jax.eval_shape(lambda: params), mesh, rules))
        assert found == {
            "embed/kernel": P(None, "fsdp"),
            "embed/bias": P(),                       # too small
            "blocks/up/kernel": P(None, None, "fsdp"),
            "blocks/odd": P(),                       # only the layer axis divides
            "blocks/square": P(None, None, "fsdp"),  # of equals the last
        }, found

        # An optimizer's moments lie as the parameters do, its counters on every device.
        optimizer = optax.adamw(1e-3)
        shapes = jax.eval_shape(optimizer.init, params)
        layout = shardings(shapes, mesh, rules)
        state = specs(layout)
        for path, spec in found.items():
            assert state["0/mu/" + path] == state["0/nu/" + path] == spec
        assert state["0/count"] == P()
        placed = jax.jit(optimizer.init, out_shardings=layout)(params)
        assert placed[0].mu["embed"]["kernel"].addressable_shards[0].data.shape == (16, 64)

        # Named rules come first, and count axes from the end.
        tensor = make_mesh(MeshConfig(data=1, fsdp=2, tensor=4))
        named = ShardingRules(rules=((r"up/kernel$", ("fsdp", "tensor")), (r"embed/", ())), minimum=1024)
        found = specs(shardings(params, tensor, named))
        assert found["blocks/up/kernel"] == P(None, "fsdp", "tensor")
        assert found["embed/kernel"] == P()
        assert found["blocks/square"] == P(None, None, "fsdp")
        both = specs(shardings(params, tensor, ShardingRules(rules=((r"square", ((("fsdp", "tensor")),)),))))
        assert both["blocks/square"] == P(None, None, ("fsdp", "tensor"))

        # Rows lie over data and fsdp; the values are those of one device.
        batch = {"x": np.arange(48, dtype=np.float32).reshape(16, 3), "ids": np.arange(16)}
        placed = shard_batch(batch, mesh)
        assert placed["x"].sharding == batch_sharding(mesh)
        assert [s.data.shape for s in placed["x"].addressable_shards] == [(2, 3)] * 8
        np.testing.assert_array_equal(placed["x"], batch["x"])
        assert len({str(s.index) for s in shard_batch(batch, tensor)["x"].addressable_shards}) == 2
        try:
            shard_batch({"x": np.ones((12, 3))}, mesh)
        except UserError as error:
            assert str(error) == "x has 12 rows for 8 devices along data and fsdp; use a multiple of 8", error
        else:
            raise AssertionError("12 rows on 8 devices")
        try:
            shardings({"a": jnp.ones((6, 6))}, tensor, ShardingRules(rules=(("a", ("tensor",)),)))
        except UserError as error:
            assert "'a' splits an axis of a [6, 6] over tensor=4, which does not divide 6" in str(error), error
        else:
            raise AssertionError("6 over 4")

        # A sharded computation gives what one device gives.
        loss = lambda p, x: jnp.sum(jnp.tanh(x @ p["k"]) ** 2)
        p = {"k": jnp.linspace(-1, 1, 64 * 32).reshape(64, 32)}
        x = np.linspace(0, 1, 8 * 64, dtype=np.float32).reshape(8, 64)
        one = jax.jit(jax.grad(loss))(p, x)["k"]
        layout = shardings(p, mesh, ShardingRules(minimum=1))
        eight = jax.jit(jax.grad(loss), out_shardings=layout)(jax.device_put(p, layout), shard_batch(x, mesh))["k"]
        assert eight.sharding.spec == P("fsdp", None)
        np.testing.assert_allclose(eight, one, rtol=1e-5, atol=1e-5)
        print("done")
    """
    check_on_eight_devices(code)


def test_two_processes_give_one_global_batch():
    imports = """
        import numpy as np
        from dit_video.distributed import MeshConfig, make_mesh, shard_batch
        from dit_video.core.errors import UserError
    """
    code = """
        whole = np.arange(24, dtype=np.float32).reshape(8, 3)
        for config in (MeshConfig(), MeshConfig(fsdp=2), MeshConfig(fsdp=2, context=2)):
            mesh = make_mesh(config)
            batch = shard_batch({"x": whole[4 * index : 4 * index + 4]}, mesh)["x"]
            assert batch.shape == (8, 3), batch.shape
            total = jax.jit(lambda x: (x * np.arange(8)[:, None]).sum(axis=0))(batch)
            np.testing.assert_array_equal(total, (whole * np.arange(8)[:, None]).sum(axis=0))
        try:
            shard_batch({"x": whole[:3]}, make_mesh(MeshConfig()))
        except UserError as error:
            assert "3 rows for 2 devices" in str(error), error
        else:
            raise AssertionError("3 rows on 2 devices")
        print("done")
    """
    for output in run_together(imports, code, devices=2):
        assert "done" in output, output


def test_one_device_keeps_everything_whole():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    leaf = jax.ShapeDtypeStruct((512, 512), np.float32)
    assert make_shardings({"kernel": leaf}, mesh)["kernel"].spec == PartitionSpec()
    batch = (np.ones((3, 2)), {"y": np.zeros(3)})
    placed = shard_batch(batch, mesh)
    assert jax.tree.structure(placed) == jax.tree.structure(batch)


def test_rules_that_cannot_apply_say_so():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    leaf = {"bias": jax.ShapeDtypeStruct((8,), np.float32)}
    with pytest.raises(UserError, match="names model; the mesh has data, fsdp, tensor, context"):
        make_shardings(leaf, mesh, ShardingRules(rules=(("bias", ("model",)),)))
    with pytest.raises(UserError, match=r"has 2 axes, bias has 1\. Put a rule for bias before it"):
        make_shardings(leaf, mesh, ShardingRules(rules=(("bias", (None, "fsdp")),)))
