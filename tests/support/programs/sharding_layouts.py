"""Check the layouts of arrays on eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

from dit_video.core import trees
from dit_video.core.errors import UserError
from dit_video.distributed import (
    Parallelism,
    ShardingRules,
    count_row_shards,
    make_batch_sharding,
    make_mesh,
    make_shardings,
    shard_batch,
)

PARAMS = {
    "embed": {"kernel": jnp.ones((16, 256)), "bias": jnp.zeros((256,))},
    "blocks": {
        "up": {"kernel": jnp.ones((12, 8, 64))},
        "odd": jnp.ones((400, 7, 9)),
        "square": jnp.ones((4, 64, 64)),
    },
}


def get_specs(tree) -> dict[str, P]:
    """Return the partition spec of every leaf, by its path."""
    return {path: leaf.spec for path, leaf in trees.flatten(tree).items()}


def get_error(function, *arguments) -> str:
    """Return the message of the error that a call raises."""
    try:
        function(*arguments)
    except UserError as error:
        return str(error)
    raise AssertionError("no error")


def check_default_rule(mesh) -> None:
    """Check parameters and the state of their optimizer."""
    rules = ShardingRules(min_size=1024)
    specs = get_specs(make_shardings(jax.eval_shape(lambda: PARAMS), mesh, rules))
    assert specs == {
        "embed/kernel": P(None, "fsdp"),
        "embed/bias": P(),  # too small
        "blocks/up/kernel": P(None, None, "fsdp"),
        "blocks/odd": P(),  # only the layer axis is divisible
        "blocks/square": P(None, None, "fsdp"),  # the last of equal axes
    }, specs

    # An optimizer's moments have the layout of the parameters; its counters are on every device.
    optimizer = optax.adamw(1e-3)
    layout = make_shardings(jax.eval_shape(optimizer.init, PARAMS), mesh, rules)
    state_specs = get_specs(layout)
    for path, spec in specs.items():
        assert state_specs["0/mu/" + path] == state_specs["0/nu/" + path] == spec
    assert state_specs["0/count"] == P()
    state = jax.jit(optimizer.init, out_shardings=layout)(PARAMS)
    assert state[0].mu["embed"]["kernel"].addressable_shards[0].data.shape == (16, 64)


def check_named_rules(mesh) -> None:
    """Check that named rules come first, and count axes from the end."""
    rules = ShardingRules(rules=((r"up/kernel$", ("fsdp", "tensor")), (r"embed/", ())), min_size=1024)
    specs = get_specs(make_shardings(PARAMS, mesh, rules))
    assert specs["blocks/up/kernel"] == P(None, "fsdp", "tensor")
    assert specs["embed/kernel"] == P()
    assert specs["blocks/square"] == P(None, None, "fsdp")
    both = get_specs(make_shardings(PARAMS, mesh, ShardingRules(rules=((r"square", ((("fsdp", "tensor")),)),))))
    assert both["blocks/square"] == P(None, None, ("fsdp", "tensor"))
    message = get_error(make_shardings, {"a": jnp.ones((6, 6))}, mesh, ShardingRules(rules=(("a", ("tensor",)),)))
    assert "'a' splits an axis of a [6, 6] over tensor=4, which does not divide 6" in message, message


def check_batches(mesh, tensor_mesh) -> None:
    """Check that rows are split over data and fsdp, with the values of one device."""
    batch = {"x": np.arange(48, dtype=np.float32).reshape(16, 3), "ids": np.arange(16)}
    sharded = shard_batch(batch, mesh)
    assert sharded["x"].sharding == make_batch_sharding(mesh)
    assert [shard.data.shape for shard in sharded["x"].addressable_shards] == [(2, 3)] * 8
    np.testing.assert_array_equal(sharded["x"], batch["x"])
    assert len({str(shard.index) for shard in shard_batch(batch, tensor_mesh)["x"].addressable_shards}) == 2
    message = get_error(shard_batch, {"x": np.ones((12, 3))}, mesh)
    assert message == "x has 12 rows for 8 devices along data and fsdp. Use a multiple of 8.", message


def check_gradients(mesh) -> None:
    """Check that a sharded computation has the result of one device."""

    def loss(params, x):
        return jnp.sum(jnp.tanh(x @ params["k"]) ** 2)

    params = {"k": jnp.linspace(-1, 1, 64 * 32).reshape(64, 32)}
    x = np.linspace(0, 1, 8 * 64, dtype=np.float32).reshape(8, 64)
    expected = jax.jit(jax.grad(loss))(params, x)["k"]
    layout = make_shardings(params, mesh, ShardingRules(min_size=1))
    gradient = jax.jit(jax.grad(loss), out_shardings=layout)(jax.device_put(params, layout), shard_batch(x, mesh))["k"]
    assert gradient.sharding.spec == P("fsdp", None)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)


def main() -> None:
    """Run all checks."""
    mesh = make_mesh(Parallelism(fsdp=4))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 4, "tensor": 1, "context": 1}
    assert count_row_shards(mesh) == 8
    assert count_row_shards(make_mesh(Parallelism(fsdp=2, tensor=2))) == 4
    tensor_mesh = make_mesh(Parallelism(data=1, fsdp=2, tensor=4))
    check_default_rule(mesh)
    check_named_rules(tensor_mesh)
    check_batches(mesh, tensor_mesh)
    check_gradients(mesh)
    print("done")


if __name__ == "__main__":
    main()
