"""Compare the traffic between slices in programs for two and four slices of a v5e with what is computed by hand."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dit_video.distributed import Parallelism, Slices, make_mesh
from dit_video.distributed.mesh import count_axis_slices
from dit_video.planning import Topology, compile_step
from dit_video.planning.plan import plan_experiment
from dit_video.training.optim.optimizer import AdamW
from dit_video.training.optim.schedules import Constant
from support import tiny

WIDTH = 512
WEIGHT_BYTES = 4 * WIDTH * WIDTH


def compute_gradient(mesh, weights, x):
    return jax.grad(lambda weights: jnp.sum(jnp.tanh(x @ weights) ** 2))(weights)


def exchange(mesh, x):
    def swap(x):
        return jax.lax.all_to_all(x, "context", 1, 0, tiled=True)

    return jax.shard_map(swap, mesh=mesh, in_specs=P("context"), out_specs=P(None, "context"))(x)


def pass_on(mesh, x):
    def shift(x):
        return jax.lax.ppermute(x, "context", [(rank, (rank + 1) % 8) for rank in range(8)])

    return jax.shard_map(shift, mesh=mesh, in_specs=P("context"), out_specs=P("context"))(x)


def read_traffic(slices: int, config: Parallelism, function, specs, out, sizes) -> dict:
    """Return the bytes between slices, by kind and axes, of a function that is compiled for slices of 2x2 chips."""
    devices = Topology.parse(f"v5e:2x2*{slices}").get_devices()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mesh = make_mesh(config, devices)
    arguments = tuple(
        jax.ShapeDtypeStruct(size, jnp.float32, sharding=NamedSharding(mesh, spec))
        for size, spec in zip(sizes, specs, strict=True)
    )
    jitted = jax.jit(lambda *values: function(mesh, *values), out_shardings=NamedSharding(mesh, out))
    compiled = compile_step(jitted, arguments, mesh, slices=count_axis_slices(config, len(devices), slices))
    assert all(part.between_slices for part in compiled.program.slice_transfers.values())
    return {key: part.bytes for key, part in compiled.program.slice_transfers.items()}


def check_collectives() -> None:
    """Check every kind of transfer, and the axes along which slices lie."""
    layer = ([P("fsdp"), P(("data", "fsdp"))], P("fsdp"), [(WIDTH, WIDTH), (64, WIDTH)])
    # Along data: each device sums its shard of the gradient with one or three others.
    for slices in (2, 4):
        traffic = read_traffic(slices, Parallelism(data=slices, fsdp=4), compute_gradient, *layer)
        assert traffic == {("all-reduce", ("data",)): 2 * (slices - 1) / slices * WEIGHT_BYTES / 4}, traffic
    # Partly along data: the sum inside a slice leaves each device a quarter.
    traffic = read_traffic(2, Parallelism(data=4, fsdp=2), compute_gradient, *layer)
    assert traffic == {("all-reduce", ("data",)): WEIGHT_BYTES / 4}, traffic
    # Along fsdp: each device gets its counterpart's shard of the weights; the quarter of a slice's gradient is summed.
    gathered, summed = ("all-gather", ("fsdp",)), ("all-reduce", ("fsdp",))
    traffic = read_traffic(2, Parallelism(data=1, fsdp=8), compute_gradient, *layer)
    assert traffic == {gathered: WEIGHT_BYTES / 8, summed: WEIGHT_BYTES / 4}, traffic
    # Along both, where an eighth of the gradient is left to be summed along data.
    config = Parallelism(data=2, fsdp=8, slices=Slices(data=2, fsdp=2))
    traffic = read_traffic(4, config, compute_gradient, *layer)
    along_data = {("all-reduce", ("data",)): WEIGHT_BYTES / 8}
    assert traffic == {gathered: WEIGHT_BYTES / 8, summed: WEIGHT_BYTES / 4} | along_data, traffic
    # Along context: half of what is exchanged, or all that is passed on.
    local = 4 * 8 * 64 * 128
    config, tokens = Parallelism(data=1, context=8), (64, 64, 128)
    traffic = read_traffic(2, config, exchange, [P("context")], P(None, "context"), [tokens])
    assert traffic == {("all-to-all", ("context",)): local / 2}, traffic
    traffic = read_traffic(2, config, pass_on, [P("context")], P("context"), [tokens])
    assert traffic == {("collective-permute", ("context",)): local}, traffic


def check_plan() -> None:
    """Check the plan of a training step, whose gradients alone cross the slices."""
    experiment = tiny.EXPERIMENT.replace_stage("denoiser", batch=8, optimizer=AdamW(schedule=Constant(warmup=1)))
    experiment = experiment.replace_backbone(width=128, attention="dense")
    experiment = dataclasses.replace(experiment, parallel=Parallelism(data=2, fsdp=4))
    plan = plan_experiment(experiment, Topology.parse("v5e:2x2*2"))
    crossing = [part for part in plan.moved if part.between_slices]
    assert {part.axes for part in crossing} == {("data",)}, crossing
    # Two times half of each device's gradients; small arrays are padded to tiles of 4 KiB.
    total = sum(part.bytes for part in crossing)
    assert plan.memory.parameters <= total <= 1.25 * plan.memory.parameters, (total, plan.memory)
    assert plan.warning is None
    assert plan.times.collectives > total / plan.topology.chip.network_bandwidth
    assert "between slices" in str(plan)
    assert "on v5e:2x2*2, 8 devices, mesh data=2 fsdp=4" in str(plan)


def check_warning() -> None:
    """Check that a mesh whose weights cross the slices is warned of."""
    devices = Topology.parse("v5e:2x2*2").get_devices()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_mesh(Parallelism(data=2, fsdp=4), devices)
        assert not caught
        make_mesh(Parallelism(data=1, fsdp=8), devices)
    (warning,) = caught
    assert "2 slices lie along fsdp, so weights are gathered over" in str(warning.message)
    assert "Use a mesh whose data is a multiple of 2" in str(warning.message)


if __name__ == "__main__":
    check_warning()
    check_collectives()
    check_plan()
    print("done")
