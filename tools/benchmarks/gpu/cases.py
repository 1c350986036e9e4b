"""Running of cases in processes of their own: one that fails, or takes too long, does not end the others."""

import json
import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.gpu.figures import DETAILS, Case, Document, describe_machine
from benchmarks.timer import TimeBudget
from dit_video.core.errors import UserError

MACHINE = "machine"
"""Name of the case that measures nothing."""
MIN_SECONDS = 1.0
"""Least seconds for which a case is started."""


def run_part(part: str, cases: Sequence[Case], document: Document, *, seconds: float, arguments: Sequence[str]) -> None:
    """Measure the cases of a part one after the other, until the seconds are spent.

    Args:
      part: Name of the part.
      cases: Its cases.
      document: JSON that figures are written to.
      seconds: Budget of the part.
      arguments: Command-line arguments of the process of a case, besides its name and budget.
    """
    budget, spent = TimeBudget(seconds), f"the {seconds:g} s of the part were spent"
    for case in cases:
        if budget.remaining < MIN_SECONDS:
            document.mark_unmeasured(part, case, spent)
            print(f"{part}: {case.name}: not measured: {spent}", file=sys.stderr, flush=True)
            continue
        document.forget(part, case)
        print(f"{part}: {case.name}, {budget.remaining:.0f} s left", file=sys.stderr, flush=True)
        machine: dict[str, Any] = {}
        reason = "the case ended without it"
        for name, value in start_case(part, case.name, budget, arguments, flags=case.flags):
            if name == MACHINE:
                machine = {key: value[key] for key in ("device", "jax", "date")}
                document.add_details(part, case.name, {MACHINE: value})
            elif name == DETAILS:
                document.add_details(part, case.name, value)
            elif name == "reason":
                reason = value
            else:
                document.add(part, name, value, machine)
                print(f"  {name}: {value}", file=sys.stderr, flush=True)
        if not document.is_measured(part, case):
            if budget.is_spent:
                reason = spent
            print(f"  not measured: {reason}", file=sys.stderr, flush=True)
            document.mark_unmeasured(part, case, reason)


def start_case(
    part: str,
    name: str,
    budget: TimeBudget,
    arguments: Sequence[str],
    *,
    flags: Sequence[str] = (),
) -> Iterator[tuple[str, Any]]:
    """Start a case's process and yield what it prints, with a reason if it fails; end it when the budget is spent.

    Args:
      part: Name of the part.
      name: Name of the case.
      budget: Seconds that are left.
      arguments: Further command-line arguments.
      flags: Flags of XLA, besides those of this process.
    """
    command = [*get_command_prefix(sys.orig_argv, sys.argv), part, "--case", name, *arguments]
    command += ["--seconds", f"{budget.remaining:.0f}"]
    environment = dict(os.environ)
    if flags:
        environment["XLA_FLAGS"] = " ".join([environment.get("XLA_FLAGS", ""), *flags]).strip()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    timer = threading.Timer(budget.remaining, process.kill)
    timer.start()
    has_reason = False
    try:
        for line in process.stdout:
            if line.startswith("{"):
                values = json.loads(line)
                has_reason |= "reason" in values
                yield from values.items()
        if process.wait() and not has_reason:
            yield "reason", f"its process ended with exit code {process.returncode}"
    finally:
        timer.cancel()
        process.kill()
        process.wait()


def get_command_prefix(original: Sequence[str], arguments: Sequence[str]) -> list[str]:
    """Return the command that starts this script as this process was started, without the script's arguments.

    Args:
      original: The interpreter's command line, `sys.orig_argv`.
      arguments: The script and its arguments, `sys.argv`.
    """
    if list(original[len(original) - len(arguments) :]) == list(arguments):
        return [sys.executable, *original[1 : len(original) - len(arguments) + 1]]
    return [sys.executable, arguments[0]]


def print_case(case: Case | None, budget: TimeBudget) -> int:
    """Measure a case in this process, print figures as lines of JSON, and return the exit code; None measures nothing.

    A case that fails prints the reason.
    """
    _print({MACHINE: describe_machine()})
    if case is None:
        return 0
    try:
        for name, value in case.measure(budget):
            _print({name: value})
    except UserError as error:
        _print({"reason": str(error)})
    except Exception as error:  # of a kernel, a compiler or an allocator
        traceback.print_exc()
        _print({"reason": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"})
        return 1
    return 0


def _print(values: dict[str, Any]) -> None:
    print(json.dumps(values), flush=True)
