"""Report of a planned step's program: attention, kernels and dtypes, also for GPUs that are not present."""

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import PyTree

from dit_video.core.hlo import Program, read_program
from dit_video.core.platform.devices import Platform
from dit_video.core.platform.xla_flags import list_flags
from dit_video.distributed import MeshPartitioner, Parallelism, make_mesh
from dit_video.experiment import Experiment
from dit_video.planning.compiled_program import CompiledStep, assume_hopper, override_default_backend
from dit_video.planning.hardware import Topology
from dit_video.planning.steps import Part, fill_row, plan_step
from dit_video.training.program_report import ProgramReport, describe_program


def describe_planned_program(
    experiment: Experiment,
    part: Part,
    topology: Topology,
    mesh: Mapping[str, int],
    compiled: CompiledStep | None,
    *,
    clips: int | None = None,
) -> ProgramReport | None:
    """Return the report of a planned step's program, as a run writes it; None if its operations are not known.

    For GPUs that are not present, the step is lowered for one, not compiled: its kernels and dtypes are those of all
    devices, but fusions and collectives are not known. This takes seconds.
    """
    chip = topology.chip
    flags = list_flags(chip.kind, chip.name, topology.num_chips)
    if compiled is not None:
        program = compiled.program
        return None if program is None else describe_program(program, mesh, chip.kind, chip, flags=flags)
    if chip.kind != "gpu" or part == "autoencoder":
        return None
    alone = dataclasses.replace(experiment, parallel=Parallelism())
    partitioner = _StandIn(
        make_mesh(alone.parallel, jax.devices()[:1]), alone.parallel.context_attention, chip.platform
    )
    planned = plan_step(alone, part, partitioner, clips=fill_row(alone, clips))
    program = read_lowered(planned.step, planned.arguments)
    return describe_program(program, mesh, chip.kind, chip, flags=flags, is_compiled=False)


@dataclass(frozen=True)
class _StandIn(MeshPartitioner):
    """A mesh of this machine's devices, which stand for those of another platform."""

    stood_for: Platform

    @property
    def platform(self) -> Platform:
        return self.stood_for


def read_lowered(step: Any, arguments: tuple[PyTree, ...]) -> Program:
    """Return the operations of a jitted step as it is given to the compiler for GPUs."""
    with override_default_backend("gpu"), assume_hopper():
        lowered = step.trace(*arguments).lower(lowering_platforms=("cuda",))
    module = lowered.compiler_ir("hlo").as_hlo_module()
    # The public text of a lowered program lacks scopes. jaxlib has moved the options from one module to another.
    options = sys.modules[type(module).__module__].HloPrintOptions()
    options.print_metadata = options.print_percent = True  # as the text of compiled programs is
    return read_program(module.to_string(options), {})
