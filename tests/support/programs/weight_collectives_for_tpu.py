"""Check how a step that is compiled for 16 TPU chips gathers weights and sums their gradients."""

import dataclasses
import math
import re

from dit_video.core.trees import count_values
from dit_video.distributed import Parallelism, make_partitioner
from dit_video.planning import (
    Topology,
    compute_min_collective_bytes,
    count_context_weights,
    read_program,
    sum_collective_bytes,
)
from dit_video.planning.compiled_program import override_default_backend
from dit_video.planning.steps import fill_row, plan_step
from dit_video.training.optim.optimizer import AdamW
from dit_video.training.optim.schedules import Constant
from support import tiny

STATE_AXES = ("fsdp", "context")
# The compiler may write a reduce-scatter as an all-reduce whose parts are taken.
COLLECTIVE = re.compile(r"= \(?(\w+)\[([\d,]*)\].* (all-gather|all-reduce|reduce-scatter)(-start)?\(")


def make_experiment():
    """Return the tiny experiment with a wide denoiser in bfloat16, whose weights outweigh its activations."""
    experiment = tiny.EXPERIMENT
    options = {"attention": "chunked", "remat": "full", "dtype": "bfloat16"}
    experiment = experiment.replace_backbone(width=512, layers=4, heads=4, **options)
    experiment = experiment.replace_model(layout=dataclasses.replace(experiment.model.layout, tokens=64))
    return experiment.replace_stage("denoiser", batch=4, optimizer=AdamW(schedule=Constant(warmup=2)))


def main() -> None:
    """Compile the step and check its collectives."""
    experiment = make_experiment()
    partitioner = make_partitioner(Parallelism(data=1, fsdp=4, context=4), Topology.parse("v6e:4x4").get_devices())
    planned = plan_step(experiment, "denoiser", partitioner, clips=fill_row(experiment))
    with override_default_backend("tpu"):
        lowered = planned.step.trace(*planned.arguments).lower(lowering_platforms=("tpu",))
    text = lowered.compile().as_text()
    moved = read_program(text, dict(partitioner.mesh.shape)).collectives
    for part in moved.values():
        print(part)

    parameters = count_values(planned.arguments[0].params)
    options = {"context_weights": count_context_weights(experiment.model.backbone)}
    bound = compute_min_collective_bytes(planned.costs, parameters, partitioner, **options)["weights"]
    ratio = sum_collective_bytes("weights", list(moved.values())) / bound
    print(ratio)
    assert ratio <= 1.1
    # Weights are gathered in bfloat16 for each of two forward passes, gradients summed in float32.
    once = 15 / 16 * parameters
    gathered = sum(part.bytes for (kind, _), part in moved.items() if kind == "all-gather")
    assert 2 * 2 * once <= 1.1 * gathered <= 1.1**2 * 2 * 2 * once
    # First over one axis, then over the other: the compiler makes all-reduces of small gathers over both.
    assert moved["all-gather", ("fsdp",)].bytes > moved["all-gather", ("context",)].bytes > 0
    assert moved["all-reduce", STATE_AXES].bytes < 0.05 * gathered
    layers = planned.layer_bytes * experiment.model.backbone.layers
    assert 0.9 * 3 / 4 * layers <= moved["reduce-scatter", ("fsdp",)].bytes
    kernel, dtypes = experiment.model.backbone.width**2, set()
    for line in text.splitlines():
        match = COLLECTIVE.search(line)
        # In the loops over layers; maps of the time, outside of them, are float32.
        if match and "while/body" in line and math.prod(map(int, filter(None, match[2].split(",")))) >= kernel:
            dtypes.add(("gathered" if match[3] == "all-gather" else "summed", match[1]))
    assert dtypes == {("gathered", "bf16"), ("summed", "f32")}, dtypes
    print("done")


if __name__ == "__main__":
    main()
