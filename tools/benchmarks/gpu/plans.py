"""Plans against measurements: the memory and the time of a training step, as its compiled program tells and as it runs.

The first case calibrates the machine (`tools/plan.py --calibrate`), and the expected times are by its efficiencies; the
peak rates give the lower bound. Memory is that of the device, of a process for each case.
"""

import functools
import statistics
from collections.abc import Iterator
from typing import Any

import jax

from benchmarks.gpu.figures import DETAILS, Case, Figure
from benchmarks.gpu.models import TrainingSize, find_machine, fits, make_row_training, time_steps
from benchmarks.gpu.training import name_case
from benchmarks.steps import get_peak_memory
from benchmarks.timer import TimeBudget
from dit_video.core.errors import UserError
from dit_video.nn import Remat
from dit_video.planning import compute_expected_times, compute_step_times, get_calibration_folder, read_step_work
from dit_video.planning.efficiencies import calibrate

REMATS: tuple[Remat, ...] = ("dots_attention", "full")
"""Recomputation of the first model and of the second."""
_STEPS = 5


def list_cases(size: TrainingSize) -> list[Case]:
    """Return the calibration, and a case for each of the first two models on rows of few and many clips."""
    cases = [Case(name="calibration", figures=_list_efficiency_figures(), measure=functools.partial(_calibrate, size))]
    for model, remat in zip(size.models, REMATS, strict=False):
        for clips in size.clips:
            name = f"{name_case(model, clips)}, remat {remat}"
            figures = (
                Figure(name=f"{name}: planned / measured memory", target="0.97 to 1.03"),
                Figure(name=f"{name}: expected / measured step time", target="0.9 to 1.1"),
            )
            measure_case = functools.partial(measure, size, model, clips, remat)
            cases.append(Case(name=name, figures=figures, measure=measure_case))
    return cases


def _list_efficiency_figures() -> tuple[Figure, ...]:
    return (Figure(name="products: share of the peak", unit="%"), Figure(name="memory: share of the peak", unit="%"))


def _calibrate(size: TrainingSize, budget: TimeBudget) -> Iterator[tuple[str, Any]]:
    """Yield the shares of the peak rates that the machine reaches, and keep them for plans."""
    del budget  # It takes a minute.
    calibration = calibrate(jax.devices()[:1], size=size.calibration)
    calibration.write(get_calibration_folder())
    shares = {work: each.share for work, each in calibration.measured.by_work.items()}
    yield DETAILS, shares
    for figure, work in zip(_list_efficiency_figures(), ("products", "memory"), strict=True):
        yield figure.name, shares[work]


def measure(size: TrainingSize, model: str, clips: int, remat: Remat, budget: TimeBudget) -> Iterator[tuple[str, Any]]:
    """Yield the figures of one configuration.

    Raises:
      UserError: If the plan does not fit in memory, or if the device's peak is unknown.
    """
    name, machine = f"{name_case(model, clips)}, remat {remat}", find_machine(size)
    training = make_row_training(size, model, clips, remat)
    compiled = training.compile()
    planned = compiled.memory
    if not fits(compiled, machine):
        sizes = f"{planned.peak / 2**30:.1f} GiB are planned, and {machine.memory / 2**30:.1f} GiB are there"
        raise UserError(f"it does not fit: {sizes}")
    work = read_step_work(compiled, training.costs, model_flops=training.model_flops)
    mesh = dict(training.mesh.shape)
    limits = compute_step_times(work, machine.topology, mesh)
    expected = compute_expected_times(work, machine.efficiencies, machine.topology, mesh)
    timed = time_steps(training, compiled, budget, min(_STEPS, size.steps))
    memory, median = get_peak_memory(), statistics.median(timed.seconds)
    yield (
        DETAILS,
        {
            "planned bytes": vars(planned),
            "measured bytes": memory,
            "step": median,
            "limit": limits.apart,
            "expected": None if expected is None else expected.scheduled,
            "executed flops": work.flops,
            "counted flops": training.costs.executed_flops,
            "bytes moved in memory": work.bytes,
            "kernel calls": None if compiled.program is None else compiled.program.kernel_calls,
            "compile seconds": compiled.compile_seconds,
        },
    )
    yield f"{name}: planned / measured memory", planned.peak / memory["bytes"]
    if expected is None:
        raise UserError(f"no efficiency of products or of {training.costs.attention} attention is known; calibrate")
    yield f"{name}: expected / measured step time", expected.scheduled / median
