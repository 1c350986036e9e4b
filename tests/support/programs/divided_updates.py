"""Muon's matrices and the sums of accumulated gradients are divided over eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dit_video.core import trees
from dit_video.distributed import Parallelism, make_mesh, make_shardings
from dit_video.planning import read_program
from dit_video.training.optim.muon import scale_by_muon
from dit_video.training.step import LossDetails, LossOutput, accumulate_gradients

SHAPES = {"up": (64, 256), "out": (64, 64)}
MESHES = {
    Parallelism(fsdp=8): (8, 6),
    Parallelism(data=2, fsdp=2, context=2): (8, 6, 3),
    Parallelism(fsdp=2, tensor=2, context=2): (6,),
}
"""Numbers of layers by mesh."""


def make_stacks(layers):
    draw = np.random.default_rng(layers)
    stacks = {name: draw.normal(size=(layers, *shape)).astype(np.float32) for name, shape in SHAPES.items()}
    return {"blocks": {name: {"kernel": stack} for name, stack in stacks.items()}, "head": {"kernel": stacks["up"][0]}}


def compile_update(gradients, mesh=None, layout=None):
    """Return the compiled update, its first state and its gradients."""
    optimizer = scale_by_muon(0.2, mesh=mesh)
    state = optimizer.init(gradients)
    if layout is not None:
        gradients, state = (jax.device_put(tree, make_shardings(tree, layout)) for tree in (gradients, state))
    shardings = None if layout is None else jax.tree.map(lambda leaf: leaf.sharding, (gradients, state))
    return jax.jit(optimizer.update, out_shardings=shardings).lower(gradients, state).compile(), gradients, state


def count_flops(program):
    return read_program(program.as_text(), {"data": 8}).flops


def check_muon(config, layers):
    mesh, gradients = make_mesh(config), make_stacks(layers)
    program, sharded, state = compile_update(gradients, mesh, mesh)
    alone, whole, first = compile_update(gradients)
    result, expected = trees.flatten(program(sharded, state)[0]), trees.flatten(alone(whole, first)[0])
    for path, leaf in result.items():
        np.testing.assert_allclose(leaf, expected[path], atol=1e-5, err_msg=path)
        assert leaf.sharding == trees.flatten(sharded)[path].sharding, path
    # Each device computes whole matrices, and none twice.
    stacks = {"blocks": sharded["blocks"]}
    divided = compile_update(stacks, mesh, mesh)[0]
    own = compile_update({"blocks": make_stacks(-(-layers // 8))["blocks"]})[0]
    assert count_flops(divided) == count_flops(own), (config, layers)
    collectives = read_program(divided.as_text(), dict(mesh.shape)).collectives
    assert {kind for kind, _ in collectives} <= {"all-to-all", "all-gather"}, collectives
    return count_flops(divided) / count_flops(compile_update(stacks, layout=mesh)[0])


def check_sums(config):
    mesh = make_mesh(config)
    params = {"blocks": {"up": {"kernel": jnp.ones((8, 64, 256))}}}
    params = jax.device_put(params, make_shardings(params, mesh))
    batch = jax.device_put(np.ones((16, 64), np.float32), NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))

    def loss(params, batch, step):
        values = jnp.einsum("bm,lmn->bln", batch, params["blocks"]["up"]["kernel"])
        return LossOutput((values**2).mean(), LossDetails({}, jnp.float32(len(batch))))

    accumulate = jax.jit(lambda params, batch: accumulate_gradients(loss, 4, params, batch, 0, mesh=mesh)[1])
    program = accumulate.lower(params, batch).compile()
    # The program is free to return another sharding, but not to carry whole sums from one microbatch to the next.
    (loop,) = (line for line in program.as_text().splitlines() if " while(" in line)
    local = params["blocks"]["up"]["kernel"].sharding.shard_shape((8, 64, 256))
    assert f"f32[{','.join(map(str, local))}]" in loop.partition("while(")[0], (config, local, loop)
    assert "f32[8,64,256]" not in loop, loop


if __name__ == "__main__":
    for config, numbers in MESHES.items():
        for layers in numbers:
            ratio = check_muon(config, layers)
            # XLA's partitioner divides the rows and columns over `tensor`, too, with a collective in each product.
            assert ratio < (0.5 if config.tensor == 1 else 1.1), (config, layers, ratio)
        check_sums(config)
    print("done")
