"""Lower a run's own training step and that of its plan for a topology, and print what both have.

The arguments are the folder of a run and a topology. The run's step is made by its stage, as `train.py` makes it, with
a batch of the run's own clips.
"""

import collections
import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import jax

from dit_video.core.hlo import read_program
from dit_video.core.platform.xla_flags import get_compiler_options, list_flags
from dit_video.experiment.run import Run
from dit_video.planning import Topology
from dit_video.planning.compiled_program import override_default_backend
from dit_video.planning.plan import make_plan_partitioner, plan_experiment
from dit_video.planning.steps import fill_row, plan_step
from dit_video.training.program_report import describe_program

OPERATION = re.compile(r"\bstablehlo\.(\w+)")
KERNEL = 'kernel_name = "'


def get_run_step(run: Run, topology: Topology) -> tuple[Any, tuple[Any, ...]]:
    """Return the step of a run's last stage on the devices of a topology, and the shapes of its arguments."""
    stage, run = run.experiment.denoiser, dataclasses.replace(run, devices=tuple(topology.get_devices()))
    stage.check(run)
    trainer, open_batches = stage.open_training(run, is_new=False)
    batches = open_batches(0)
    batch = next(iter(batches))
    batches.close()
    return trainer.get_program(batch)


def lower(step: Any, arguments: tuple[Any, ...]) -> jax.stages.Lowered:
    with override_default_backend("tpu"):
        return step.trace(*arguments).lower(lowering_platforms=("tpu",))


def describe(lowered: jax.stages.Lowered, arguments: tuple[Any, ...]) -> dict[str, Any]:
    """Return the operations of a program by kind, and the shapes and shardings of its arguments."""
    text = lowered.as_text()
    return {
        "operations": dict(sorted(collections.Counter(OPERATION.findall(text)).items())),
        "kernels": text.count("@tpu_custom_call("),
        "arguments": [f"{leaf.dtype}{leaf.shape} {leaf.sharding.spec}" for leaf in jax.tree.leaves(arguments)],
    }


def main() -> None:
    """Print both descriptions, what the plan says about its attention, and what both programs run."""
    run, topology = Run.open(Path(sys.argv[1])), Topology.parse(sys.argv[2])
    step, arguments = get_run_step(run, topology)
    experiment = run.experiment
    partitioner, _ = make_plan_partitioner(experiment, topology, "denoiser")
    planned = plan_step(experiment, "denoiser", partitioner, clips=fill_row(experiment))
    programs = lower(step, arguments), lower(planned.step, planned.arguments)
    options, mesh = get_compiler_options(topology.chip.name), dict(partitioner.mesh.shape)
    program = read_program(programs[0].compile(compiler_options=options).as_text(), mesh)
    report = describe_program(program, mesh, "tpu", topology.chip, flags=list_flags("tpu", topology.chip.name, 4))
    results = {
        "run": describe(programs[0], arguments),
        "plan": describe(programs[1], planned.arguments),
        "attention": planned.costs.attention,
        "compiled": dataclasses.asdict(report),
        "planned": dataclasses.asdict(plan_experiment(experiment, topology).program),
    }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
