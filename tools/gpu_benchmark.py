"""Measure this project on one accelerator, part by part, into one JSON; and print its figures as a table.

    python tools/gpu_benchmark.py --json figures.json                     # all parts, 12 minutes at most
    python tools/gpu_benchmark.py attention training --json figures.json  # some; their figures replace older ones
    python tools/gpu_benchmark.py plans --missing --json figures.json     # only the figures that are not there yet
    python tools/gpu_benchmark.py --table figures.json                    # the table of docs/benchmarks.md
    python tools/gpu_benchmark.py --small --json rehearsal.json           # small sizes, on any device

The parts, the most telling first, each of which ends when its time is spent:

    attention    equality with the dense reference, and leaks between clips, on the device; seconds forwards and
                 backwards against the share of pairs, at 1, 4 and 16 clips a row; a product of matrices (150 s)
    training     utilization (MFU) of 1.3 billion parameters on rows of 32,768 tokens, with 8 clips a row and with 1,
                 with and without command buffers, and which kernels take the time (150 s)
    job          clips of the shipped model against a CPU's, and quickstart.py --brief (90 s)
    epoch        one epoch of clips of mixed sizes: padded, in buckets, and packed (120 s)
    sampling     a clip of 81x480x832 by the shape of Wan 2.1 1.3B, with decoding (120 s)
    plans        calibration; planned against measured memory and step time of 4 configurations (90 s)

Each figure is written as it appears, with the device, the version of JAX, the date and its target. Cases run in
processes of their own, so that a kernel that fails, or memory that runs out, does not end the others. The flags of XLA
are the same for all scripts (`dit_video/core/platform/xla_flags.py`), and compiled programs are kept.

Only JAX, Flax, optax, einops, jaxtyping, safetensors, tokenizers and NumPy are needed, but for `job`; there is no
data to prepare.
"""

from dit_video.core.platform.scripts import prepare_script

prepare_script(__name__)

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from benchmarks.gpu import attention, epoch, job, models, plans, sampler, training
from benchmarks.gpu.cases import MACHINE, print_case, run_part, start_case
from benchmarks.gpu.figures import Case, Document, format_table, read_figures
from benchmarks.timer import TimeBudget
from dit_video.core.command_line import ArgumentParser, check_minimum
from dit_video.core.errors import UserError, script
from dit_video.core.platform.compilation_cache import enable_compilation_cache

PART_SECONDS = {"attention": 150, "training": 150, "job": 90, "epoch": 120, "sampling": 120, "plans": 90}
"""Budget of each part."""
_PROBE_SECONDS = 120


def list_cases(platform: str, *, is_small: bool) -> dict[str, list[Case]]:
    """Return the cases of every part on a platform."""
    size = models.SMALL if is_small else models.FULL
    return {
        "attention": attention.list_cases(platform, attention.SMALL if is_small else attention.AttentionSize()),
        "training": training.list_cases(size),
        "job": job.list_cases(),
        "epoch": epoch.list_cases(epoch.SMALL if is_small else epoch.FULL),
        "sampling": sampler.list_cases(sampler.SMALL if is_small else sampler.FULL),
        "plans": plans.list_cases(size),
    }


def find_platform(*, is_small: bool) -> str:
    """Return the platform of the devices, which a process of its own finds: this one must not claim their memory.

    Raises:
      UserError: If there is no accelerator, and sizes are not small.
    """
    machine: Mapping[str, str] = {}
    for name, value in start_case("attention", MACHINE, TimeBudget(_PROBE_SECONDS), ["--small"] * is_small):
        machine = value if name == MACHINE else machine
    if not machine:
        raise UserError("devices are invalid: JAX does not start on them. Use the message above, or JAX_PLATFORMS=cpu")
    if machine["platform"] == "cpu" and not is_small:
        raise UserError(
            f"device {machine['device']!r} is invalid: the sizes are for a GPU or a TPU. Use one, or --small to try "
            "the parts with small sizes."
        )
    return machine["platform"]


def print_table(path: Path) -> None:
    """Print the Markdown table of a JSON's figures."""
    content = read_figures(path)
    platform = content.get("platform", "gpu")
    print(format_table(list_cases(platform, is_small=content["small"]), content))


def run_case(part: str, name: str, seconds: float, *, is_small: bool) -> int:
    """Measure one case in this process."""
    import jax

    enable_compilation_cache()
    budget = TimeBudget(seconds)
    if name == MACHINE:
        return print_case(None, budget)
    cases = list_cases(jax.default_backend(), is_small=is_small)[part]
    return print_case(next(case for case in cases if case.name == name), budget)


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"Parts to run: {', '.join(PART_SECONDS)}.")
    parser.add_argument(
        "--json", type=Path, default=Path("gpu_benchmark.json"), help="File that figures are written to, or added to."
    )
    parser.add_argument("--table", type=Path, metavar="JSON", help="Print the table of this file; measure nothing.")
    parser.add_argument("--small", action="store_true", help="Use small sizes, to try the parts on any device.")
    parser.add_argument("--missing", action="store_true", help="Measure only what the file has no figures of.")
    parser.add_argument("--seconds", type=float, help="Budget of each part, instead of its own.")
    parser.add_argument("--case", help=argparse.SUPPRESS)  # of the processes that this one starts
    arguments = parser.parse_args()
    check_minimum(1, seconds=arguments.seconds)
    if arguments.table is not None:
        print_table(arguments.table)
        return
    if unknown := [part for part in arguments.parts if part not in PART_SECONDS]:
        raise UserError(f"part {unknown[0]!r} is invalid: it does not exist. Use {', '.join(PART_SECONDS)}.")
    parts = arguments.parts or list(PART_SECONDS)
    if arguments.case is not None:
        sys.exit(run_case(parts[0], arguments.case, arguments.seconds, is_small=arguments.small))
    document = Document(arguments.json, is_small=arguments.small)
    platform = find_platform(is_small=arguments.small)
    document.record_platform(platform)
    cases = list_cases(platform, is_small=arguments.small)
    for part in parts:
        chosen = [case for case in cases[part] if not (arguments.missing and document.is_measured(part, case))]
        seconds = arguments.seconds or PART_SECONDS[part]
        run_part(part, chosen, document, seconds=seconds, arguments=["--small"] * arguments.small)
    print(format_table(cases, document.content))


if __name__ == "__main__":
    script(main)()
