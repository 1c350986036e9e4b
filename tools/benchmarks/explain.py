"""What decides how fast our transformer is beside diffusers' on CPUs: instructions, the library of products, threads.

XLA and torch read these settings as they start, so every variant is measured in processes of its own, in turn.
"""

import json
import math
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

MEASURED = ("forward", "training step")
_COMMAND = (sys.executable, str(Path(__file__).parents[1] / "benchmark.py"), "model", "--peers")
_FUSIONS = "--xla_cpu_experimental_ynn_fusion_type={0}LIBRARY_FUSION_TYPE_DOT,{0}LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"
_DECISIVE = 1.05
"""Factor by which a setting changes a ratio to decide it; medians of five processes differ by less."""


class Variant(NamedTuple):
    """A setting of CPUs."""

    xla_flags: str = ""
    environment: Mapping[str, str] = {}
    """Environment variables of torch and its libraries."""
    cores: int | None = None
    """Number of cores, and of threads of either; None for all."""
    exists: bool = True
    """Whether this machine has it."""


VARIANTS = {
    "as it is": Variant(),
    "AVX2": Variant(
        "--xla_cpu_max_isa=AVX2",
        {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
        exists=platform.machine() in ("x86_64", "AMD64"),
    ),
    "products by YNNPACK": Variant(_FUSIONS.format("+")),
    "products by Eigen": Variant(_FUSIONS.format("-")),
    "one thread": Variant(cores=1, exists=hasattr(os, "sched_setaffinity")),
}
"""Settings of both, and, by YNNPACK and Eigen, of ours alone."""


def measure(runs: int, options: Sequence[str] = ()) -> dict[str, Any]:
    """Measure each variant in so many processes, in turn.

    Args:
      runs: Number of processes of each variant.
      options: Further options of `benchmark.py model --peers`.

    Returns:
      Medians by variant; for either measurement also the variant that changes its ratio most, if that is by a twentieth
      or more. A variant that a release lacks is named with its error, and left out.
    """
    variants = {name: one for name, one in VARIANTS.items() if one.exists}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
    failed: dict[str, str] = {}
    for run in range(runs):
        for name, variant in variants.items():
            if name in failed:
                continue
            try:
                found[name].append(_run(variant, options))
            except subprocess.CalledProcessError as error:
                failed[name] = (error.stderr.strip().splitlines() or [f"exit status {error.returncode}"])[-1]
                print(f"{name}: {failed[name]}", file=sys.stderr)
                continue
            ratios = ", ".join(f"{each} {found[name][-1][each]['ratio']:.2f}" for each in MEASURED)
            print(f"{name}, {run + 1} of {runs}: {ratios}", file=sys.stderr, flush=True)
    figures = {name: _summarize(models) for name, models in found.items() if name not in failed}
    return {"runs": runs, "variants": figures, "failed": failed, "decisive": _find_decisive(figures)}


def _find_decisive(figures: Mapping[str, Mapping[str, Any]]) -> dict[str, str | None]:
    """Return by measurement the variant that changes the ratio most, or None if none changes it by a twentieth."""
    decisive = dict[str, str | None]()
    for each in MEASURED if "as it is" in figures else ():
        start = figures["as it is"][each]["ratio"]
        changes = {name: abs(math.log(one[each]["ratio"] / start)) for name, one in figures.items()}
        name = max(changes, key=lambda name: changes[name])
        decisive[each] = name if changes[name] >= math.log(_DECISIVE) else None
    return decisive


def _run(variant: Variant, options: Sequence[str]) -> dict[str, Any]:
    flags = f"{os.environ.get('XLA_FLAGS', '')} {variant.xla_flags}".strip()
    environment = os.environ | variant.environment | ({"XLA_FLAGS": flags} if flags else {})
    cores = os.sched_getaffinity(0) if variant.cores else set()
    try:
        if variant.cores:  # a process has the cores of the one that starts it
            os.sched_setaffinity(0, sorted(cores)[: variant.cores])
        done = subprocess.run([*_COMMAND, *options], env=environment, capture_output=True, text=True, check=True)
    finally:
        if variant.cores:
            os.sched_setaffinity(0, cores)
    return json.loads(done.stdout)["model"]


def _summarize(models: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return medians over processes, with the lowest and the highest ratio."""
    figures = {}
    for each in MEASURED:
        ratios = [model[each]["ratio"] for model in models]
        seconds = {
            name: round(statistics.median(model[each]["seconds"][name] for model in models), 4)
            for name in models[0][each]["seconds"]
        }
        figures[each] = {"ratio": statistics.median(ratios), "ratios": sorted(ratios), "seconds": seconds}
    return figures
