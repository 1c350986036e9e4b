"""Classes of kernels of a traced program: their share of the step, and how many are too short to keep a GPU busy."""

import gzip
import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax

SHORT_SECONDS = 20e-6
"""Seconds below which the start of a kernel takes longer than it should count for."""
_CLASSES = (
    ("collectives", r"nccl|all-?reduce|all-?gather|reduce-?scatter"),
    ("attention", r"fmha|flash|sdpa|fused_?attention"),
    ("products", r"gemm|nvjet|cutlass|cublas|xmma|wgmma|^dot|conv(?!ert)"),
    ("copies", r"memcpy|memset|copy|transpose"),
    ("reductions", r"reduce"),
    ("other fusions", r"fusion|wrapped"),
)
"""Classes with the names of their kernels; the first that matches counts."""
_NUM_NAMED = 5
"""Number of kernels that are named, those with the largest shares."""


class Kernel(NamedTuple):
    """A run of a kernel, in seconds of the trace's clock."""

    name: str
    start: float
    stop: float


def trace_kernels(run: Callable[[], Any]) -> list[Kernel]:
    """Return the kernels that a function runs on the device, from the profiler.

    Raises:
      OSError: If the trace cannot be written.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        return [kernel for file in Path(folder).rglob("*.trace.json.gz") for kernel in read_kernels(file)]


def read_kernels(file: Path) -> list[Kernel]:
    """Read the kernels of a trace: what is on a GPU's streams, or, in a trace of a CPU, what names an operation."""
    with gzip.open(file) as content:
        events = json.load(content)["traceEvents"]
    streams = {
        (event["pid"], event["tid"])
        for event in events
        if event.get("name") == "thread_name" and event["args"]["name"].startswith("Stream")
    }
    return [
        Kernel(event["name"], 1e-6 * event["ts"], 1e-6 * (event["ts"] + event["dur"]))
        for event in events
        if event.get("ph") == "X"
        and ((event["pid"], event["tid"]) in streams if streams else "hlo_op" in event.get("args", {}))
    ]


def classify(name: str) -> str:
    """Return the class of a kernel."""
    return next((kind for kind, pattern in _CLASSES if re.search(pattern, name, re.IGNORECASE)), "others")


def summarize(kernels: Iterable[Kernel], steps: int) -> dict[str, Any]:
    """Return the table of some steps: for each class the share of the time, kernels a step, and how many are short.

    What stands first should be mended first. `idle` is the share of the time between the first kernel and the last in
    which none runs.
    """
    kernels = sorted(kernels, key=lambda kernel: kernel.start)
    if not kernels:
        return {}
    end = max(kernel.stop for kernel in kernels)
    total, busy, reached = end - kernels[0].start, 0.0, kernels[0].start
    seconds: dict[str, float] = defaultdict(float)
    named: dict[str, float] = defaultdict(float)
    counts: dict[str, list[bool]] = defaultdict(list)
    for kernel in kernels:
        busy += max(0.0, kernel.stop - max(reached, kernel.start))
        reached = max(reached, kernel.stop)
        kind = classify(kernel.name)
        seconds[kind] += kernel.stop - kernel.start
        named[kernel.name] += kernel.stop - kernel.start
        counts[kind].append(kernel.stop - kernel.start < SHORT_SECONDS)
    rows = {
        kind: {"share": seconds[kind] / total, "a step": len(short) / steps, "short": sum(short) / steps}
        for kind, short in counts.items()
    }
    return {
        "idle": 1 - busy / total,
        "classes": dict(sorted(rows.items(), key=lambda row: -row[1]["share"])),
        "largest": {name: named[name] / total for name in sorted(named, key=lambda name: -named[name])[:_NUM_NAMED]},
    }
