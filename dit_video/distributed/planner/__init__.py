"""Cost of a training or sampling step before it is run: memory, collectives and time, from its compiled program."""

from dit_video.distributed.planner.compiled_program import (
    CompiledStep,
    MemoryUsage,
    compile_step,
    count_argument_bytes,
    measure_peak_memory,
)
from dit_video.distributed.planner.costs import count_context_weights, count_step_costs, read_step_work
from dit_video.distributed.planner.efficiencies import (
    Calibration,
    Efficiencies,
    Efficiency,
    find_efficiencies,
    get_calibration_folder,
    read_calibration,
)
from dit_video.distributed.planner.estimate import StepSpec, estimate_step
from dit_video.distributed.planner.hardware import CHIPS, Chip, find_chip, get_peak_flops
from dit_video.distributed.planner.hlo import CollectiveTraffic, read_program
from dit_video.distributed.planner.lower_bounds import Purpose, compute_min_collective_bytes, sum_collective_bytes
from dit_video.distributed.planner.roofline import (
    StepTimes,
    StepWork,
    compute_expected_times,
    compute_step_times,
    get_link_bandwidth,
)
from dit_video.distributed.planner.topology import Topology
