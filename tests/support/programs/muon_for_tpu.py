"""Compile Muon's update for eight TPUs: each multiplies whole matrices, and all operands are bfloat16."""

import re

import jax
import jax.numpy as jnp

from dit_video.distributed import Parallelism, make_mesh, make_shardings
from dit_video.planning import Topology, read_program
from dit_video.planning.compiled_program import override_default_backend
from dit_video.training.optim.muon import scale_by_muon
from dit_video.training.state import attach_shardings

LAYERS, ROWS, COLUMNS = 6, 1024, 256

if __name__ == "__main__":
    mesh = make_mesh(Parallelism(data=2, fsdp=2, context=2), Topology.parse("v5e:2x4").get_devices())
    params = {"blocks": {"down": {"kernel": jax.ShapeDtypeStruct((LAYERS, ROWS, COLUMNS), jnp.float32)}}}
    optimizer = scale_by_muon(0.2, mesh=mesh)
    state = jax.eval_shape(optimizer.init, params)
    gradients, state = (attach_shardings(tree, make_shardings(tree, mesh)) for tree in (params, state))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, (gradients, state))
    update = jax.jit(optimizer.update, out_shardings=shardings)
    with override_default_backend("tpu"):
        text = update.trace(gradients, state).lower(lowering_platforms=("tpu",)).compile().as_text()
    program = read_program(text, dict(mesh.shape))
    # Five iterations with three products, of one matrix on each device.
    expected = 5 * (4 * ROWS * COLUMNS**2 + 2 * COLUMNS**3)
    assert program.flops == expected, (program.flops, expected)
    # One matrix's bytes are exchanged over `fsdp`, those of the stack come back over the others.
    assert {kind for kind, _ in program.collectives} == {"all-to-all", "all-gather"}, program.collectives
    products = [line for line in text.splitlines() if re.search(r" (dot|convolution)\(", line)]
    assert products
    shapes = dict(re.findall(r"(%[\w.-]+) = (\w+)\[", text))
    for line in products:
        operands = re.findall(r"%[\w.-]+", re.search(r" (?:dot|convolution)\(([^)]*)\)", line).group(1))
        assert {shapes[operand] for operand in operands} == {"bf16"}, line
    print("done")
