"""Model FLOPs utilization of training on packed rows of 32,768 tokens, with the recomputation that plans choose.

Only the FLOPs that the model needs count: tokens attend to their own clip, so attention counts as the sum of `n_i²`;
padding and recomputation in the backward pass do not count. Some steps after the measured ones are traced, which tells
which kernels take the time.
"""

import functools
import statistics
from collections.abc import Iterator
from typing import Any, NamedTuple

from benchmarks.gpu.figures import DETAILS, Case, Figure, count_clips
from benchmarks.gpu.kernels import summarize, trace_kernels
from benchmarks.gpu.models import TrainingSize, choose_remat, find_machine, make_row_training, time_steps
from benchmarks.steps import get_peak_memory
from benchmarks.timer import TimeBudget
from dit_video.core.errors import UserError

_SHARES = {1: ">= 52 %", 8: ">= 60 %"}
"""Utilization that is aimed for, by clips a row."""
_TRACED_STEPS = 2


NO_COMMAND_BUFFERS = ("--xla_gpu_enable_command_buffer=",)
"""Flag that launches kernels one by one, in the place of graphs."""


class Variant(NamedTuple):
    """A training that is measured."""

    model: str
    clips: int
    flags: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Return the name of the model, of its rows, and of what differs."""
        return f"{name_case(self.model, self.clips)}{', no command buffers' if self.flags else ''}"


def list_cases(size: TrainingSize) -> list[Case]:
    """Return a case for each number of clips a row of the first model, and for the most without command buffers."""
    model, *_ = size.models
    clips = sorted(size.clips, reverse=True)
    variants = [*(Variant(model, count) for count in clips), Variant(model, clips[0], NO_COMMAND_BUFFERS)]
    return [
        Case(
            name=variant.name,
            figures=(
                Figure(
                    name=f"{variant.name}: utilization (MFU)",
                    unit="%",
                    target="" if variant.flags else _SHARES[variant.clips],
                ),
                Figure(name=f"{variant.name}: median step", unit="s"),
                Figure(name=f"{variant.name}: peak memory", unit="GiB"),
                Figure(name=f"{variant.name}: remat that fits"),
                Figure(name=f"{variant.name}: time by kernels, share of the step (kernels under 20 µs)"),
            ),
            measure=functools.partial(measure, size, variant),
            flags=variant.flags,
        )
        for variant in variants
    ]


def name_case(model: str, clips: int) -> str:
    """Return the name of a model on rows of so many clips."""
    return f"{model}, {count_clips(clips)}"


def measure(size: TrainingSize, variant: Variant, budget: TimeBudget) -> Iterator[tuple[str, Any]]:
    """Yield the figures of a training.

    Raises:
      UserError: If no recomputation makes the step fit in memory, or if the device's peak is unknown.
    """
    name, machine = variant.name, find_machine(size)
    chosen = choose_remat(functools.partial(make_row_training, size, variant.model, variant.clips), machine)
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
    timed = time_steps(training, compiled, budget, size.steps)
    yield DETAILS, {"steps": timed.seconds, "loss": timed.loss}
    median = statistics.median(timed.seconds)
    yield f"{name}: median step", median
    yield f"{name}: utilization (MFU)", training.model_flops / median / machine.chip.flops
    yield f"{name}: peak memory", get_peak_memory()["bytes"] / 2**30
    try:
        table = summarize(trace_kernels(functools.partial(timed.repeat, _TRACED_STEPS)), _TRACED_STEPS)
    except (OSError, RuntimeError) as error:  # the latter of JAX's profiler
        raise UserError(f"the trace cannot be written ({error}). Use a TMPDIR with space.") from error
    if not table:
        raise UserError("the trace has no kernels. Give this user the right to profile the card (CUPTI).")
    yield DETAILS, {"kernels": table}
    rows = table.get("classes", {}).items()
    text = ", ".join(f"{kind} {row['share']:.0%} ({row['short']:.0f} of {row['a step']:.0f})" for kind, row in rows)
    yield f"{name}: time by kernels, share of the step (kernels under 20 µs)", f"{text}; idle {table['idle']:.0%}"
