"""Compare the planned memory of a step with its state and its compiled program on eight devices."""

import functools

import jax
import numpy as np

from dit_video.distributed import Parallelism, make_partitioner, make_shardings, shard_batch
from dit_video.experiment.denoiser import get_optimizer_config, init_denoiser
from dit_video.planning import compile_step
from dit_video.planning.compiled_program import compute_peak_memory, measure_peak_memory
from dit_video.planning.steps import fill_row, plan_step
from dit_video.training.state import init_state, make_on_devices
from support import tiny


def make_experiment():
    """Return the tiny experiment with a wider denoiser and more rows."""
    shape = {"width": 128, "layers": 2, "attention": "dense", "remat": "full"}
    return tiny.EXPERIMENT.replace_stage("denoiser", batch=4).replace_backbone(**shape)


def count_bytes(tree) -> int:
    """Count the bytes of a tree that lie on the first device."""
    shards = [shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards]
    return sum(shard.data.nbytes for shard in shards if shard.device == jax.devices()[0])


def main() -> None:
    """Plan a step, and run it."""
    experiment = make_experiment()
    partitioner = make_partitioner(Parallelism(data=1, fsdp=4, context=2))
    mesh = partitioner.mesh
    planned = plan_step(experiment, "denoiser", partitioner, clips=fill_row(experiment))
    compiled = compile_step(planned.step, planned.arguments, mesh)
    memory, program = compiled.memory, compiled.program
    # The step runs, but CPUs do not report their peak.
    assert measure_peak_memory(planned.step, planned.arguments) is None

    config = experiment.denoiser
    optimizer = get_optimizer_config(config).make(steps=config.steps)

    def begin(key):
        return init_state(init_denoiser(experiment.get_model(), key), optimizer)

    state = make_on_devices(begin, jax.random.key(0), shardings=functools.partial(make_shardings, mesh=mesh))
    batch = shard_batch(jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), planned.arguments[1]), mesh)
    assert memory.parameters == count_bytes(state.params), (memory, count_bytes(state.params))
    assert memory.optimizer == count_bytes(state.opt_state)
    assert memory.ema == count_bytes(state.ema) + count_bytes(state.averages)
    executable = planned.step.lower(state, batch).compile()
    analysis = executable.memory_analysis()
    peak = compute_peak_memory(analysis)
    assert abs(memory.peak - peak) <= 0.1 * peak, (memory, analysis)
    executable(state, batch)

    axes = {part.axes for part in program.collectives.values()}
    assert ("fsdp",) in axes, axes
    assert ("all-to-all", ("context",)) in program.collectives, program.collectives
    print("done")


if __name__ == "__main__":
    main()
