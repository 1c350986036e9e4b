"""Model FLOPs utilization of training on packed rows of 32,768 tokens, with the recomputation that plans choose.

Only the FLOPs that the model needs count: tokens attend to their own clip, so attention counts as the sum of `n_i²`;
padding and recomputation in the backward pass do not count.
"""

import functools
import statistics
from collections.abc import Iterator
from typing import Any

from benchmarks.gpu.figures import DETAILS, Case, Figure
from benchmarks.gpu.models import TrainingSize, choose_remat, find_machine, make_row_training, time_steps
from benchmarks.steps import get_peak_memory
from benchmarks.timer import TimeBudget
from dit_video.core.errors import UserError

_TARGETS = {("1.3 B", 1), ("1.3 B", 8), ("3 B", 1), ("3 B", 8)}
_SHARES = {1: ">= 45 % (52 %)", 8: ">= 52 % (60 %)"}
"""Required utilization, and in brackets the one that is aimed for, by clips a row."""


def list_cases(size: TrainingSize) -> list[Case]:
    """Return a case for every model and number of clips a row."""
    return [
        Case(
            name=name_case(model, clips),
            figures=(
                Figure(
                    name=f"{name_case(model, clips)}: utilization (MFU)",
                    unit="%",
                    target=_SHARES[clips] if (model, clips) in _TARGETS else "",
                ),
                Figure(name=f"{name_case(model, clips)}: median step", unit="s"),
                Figure(name=f"{name_case(model, clips)}: peak memory", unit="GiB"),
                Figure(name=f"{name_case(model, clips)}: remat that fits"),
            ),
            measure=functools.partial(measure, size, model, clips),
        )
        for model in size.models
        for clips in size.clips
    ]


def name_case(model: str, clips: int) -> str:
    """Return the name of a model on rows of so many clips."""
    return f"{model}, {clips} clip{'s' if clips > 1 else ''} a row"


def measure(size: TrainingSize, model: str, clips: int, budget: TimeBudget) -> Iterator[tuple[str, Any]]:
    """Yield the figures of a training.

    Raises:
      UserError: If no recomputation makes the step fit in memory, or if the device's peak is unknown.
    """
    name, machine = name_case(model, clips), find_machine(size)
    chosen = choose_remat(functools.partial(make_row_training, size, model, clips), machine)
    if chosen is None:
        raise UserError(f"no remat makes it fit in {machine.memory / 2**30:.1f} GiB")
    training, compiled, too_large = chosen
    yield f"{name}: remat that fits", training.config.remat
    yield (
        DETAILS,
        {
            "parameters": training.parameter_count,
            "model flops": training.model_flops,
            "attention": training.costs.attention,
            "padding share": float((training.batch.segments == 0).mean()),
            "compile seconds": compiled.compile_seconds,
            "did not fit": too_large,
            "peak flops": machine.chip.flops,
            "peak flops from": machine.chip.source,
        },
    )
    seconds, loss = time_steps(training, compiled, budget, size.steps)
    yield DETAILS, {"steps": seconds, "loss": loss}
    median = statistics.median(seconds)
    yield f"{name}: median step", median
    yield f"{name}: utilization (MFU)", training.model_flops / median / machine.chip.flops
    yield f"{name}: peak memory", get_peak_memory()["bytes"] / 2**30
