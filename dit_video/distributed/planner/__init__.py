"""Cost of a training or sampling step before it is run: memory, collectives and time, from its compiled program."""

from dit_video.distributed.planner.compiled_program import (
    CompiledStep,
    Memory,
    compile_step,
    held,
    measured_peak,
    peak_of,
)
from dit_video.distributed.planner.estimate import Step, estimate
from dit_video.distributed.planner.hardware import CHIPS, Chip, Topology, chip_of, peak_flops
from dit_video.distributed.planner.hlo import Moved, Program, read_program
from dit_video.distributed.planner.lower_bounds import least_moved, moved_over
from dit_video.distributed.planner.roofline import Times, Work, link_of, step_times

__all__ = [
    "CHIPS",
    "Chip",
    "CompiledStep",
    "Memory",
    "Moved",
    "Program",
    "Step",
    "Times",
    "Topology",
    "Work",
    "chip_of",
    "compile_step",
    "estimate",
    "held",
    "least_moved",
    "link_of",
    "measured_peak",
    "moved_over",
    "peak_flops",
    "peak_of",
    "read_program",
    "step_times",
]
