"""Costs, memory and programs of steps for hardware that need not be present.

Plans of experiments are in `planning.plan`, `fit`, `suggest` and `pipeline`, which import what trainings need.
"""

from dit_video.core.hlo import CollectiveTraffic, read_program
from dit_video.core.platform.chips import CHIPS, Chip, find_chip
from dit_video.planning.compiled_program import (
    CompiledStep,
    MemoryUsage,
    compile_step,
    count_argument_bytes,
    measure_peak_memory,
)
from dit_video.planning.costs import (
    Purpose,
    StepSpec,
    compute_min_collective_bytes,
    count_context_weights,
    count_step_costs,
    estimate_step,
    read_step_work,
    sum_collective_bytes,
)
from dit_video.planning.efficiencies import Calibration, find_efficiencies, get_calibration_folder, read_calibration
from dit_video.planning.hardware import Topology
from dit_video.planning.roofline import (
    Efficiencies,
    Efficiency,
    StepTimes,
    StepWork,
    compute_expected_times,
    compute_step_times,
    get_link_bandwidth,
)
