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

from dit_video.experiment.denoiser import make_denoiser_loss, open_trainable_denoiser
from dit_video.experiment.run import Run
from dit_video.planning import Topology
from dit_video.planning.compiled_program import override_default_backend
from dit_video.planning.hlo import read_program
from dit_video.planning.plan import make_plan_mesh
from dit_video.planning.steps import fill_row, plan_step

OPERATION = re.compile(r"\bstablehlo\.(\w+)")
KERNEL = 'kernel_name = "'


def get_run_step(run: Run, topology: Topology) -> tuple[Any, tuple[Any, ...]]:
    """Return the step of a run's last stage on the devices of a topology, and the shapes of its arguments."""
    stage = run.stages[-1]
    runtime = dataclasses.replace(run.runtime, experiment=stage.experiment, devices=tuple(topology.get_devices()))
    stage.check(runtime)
    captions, open_rows = stage.open_inputs(runtime)
    loss = make_denoiser_loss(stage.experiment, runtime.mesh, empty_caption=captions.empty)
    training, folder = stage.experiment.denoiser, runtime.folder / "denoiser"
    trained = open_trainable_denoiser(training, folder, runtime.mesh, is_resuming=True)
    rows = open_rows(0)
    batch = next(rows)
    rows.close()
    return stage.make_trainer(runtime, loss, trained).get_program(batch)


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
    """Print both descriptions, and what the plan says about its attention."""
    run, topology = Run.open(Path(sys.argv[1])), Topology.parse(sys.argv[2])
    step, arguments = get_run_step(run, topology)
    experiment = run.stages[-1].experiment
    mesh, _ = make_plan_mesh(experiment, topology, experiment.mesh, "denoiser")
    planned = plan_step(experiment, "denoiser", mesh, clips=fill_row(experiment))
    programs = lower(step, arguments), lower(planned.step, planned.arguments)
    compiled = programs[0].compile()
    results = {
        "run": describe(programs[0], arguments),
        "plan": describe(programs[1], planned.arguments),
        "attention": planned.costs.attention,
        "compiled_kernels": read_program(compiled.as_text(), dict(mesh.shape)).kernel_calls,
    }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
