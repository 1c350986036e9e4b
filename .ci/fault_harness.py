"""Inject silent faults into small trainings, and list which of them the self-check names.

    python .ci/fault_harness.py --json .ci/faults.json
    python .ci/fault_harness.py --only latents_swapped ema_off --good 0
    python .ci/fault_harness.py --part 1/4
    python .ci/fault_harness.py --again

Each fault of `tests/experiment/self_check/faults.py` is put into the code or the files of a prepared run, which is then
trained for 50 steps in a process of its own; two such processes run at a time. A fault counts as named if a problem in
`denoiser/self_check.jsonl` has one of its checks. Runs without a fault, over all variants of the training and several
seeds, count as false alarms if there is any problem. A fault that changes neither batches nor losses nor the state,
compared with the run without it, is reported as having no effect, and one whose training ends with an error as an
error: neither is a silent fault.

Results are written to the JSON file as they appear, and are not computed again. `--again` computes those that are not
as they should be. The folder keeps what was prepared for this state of the code.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from code_digest import compute_digest, digest_files

ROOT = Path(__file__).resolve().parents[1]
INJECTED = ROOT / "tests" / "experiment" / "self_check"
MAX_SECONDS = 600
"""Time limit of a case."""
SOURCE_FOLDERS = tuple(f"dit_video/{name}/" for name in ("models", "nn", "tokens", "video"))
"""Folders of code that prepared clips, latents and weights depend on."""

Result = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--good", type=int, default=20, help="Number of runs without a fault.")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="Faults to inject; all by default.")
    parser.add_argument("--part", default="1/1", metavar="K/N", help="Part of the faults to inject.")
    parser.add_argument("--json", type=Path, default=ROOT / ".ci" / "faults.json", help="File of the results.")
    parser.add_argument("--again", action="store_true", help="Compute again what was missed, failed or a false alarm.")
    parser.add_argument("--folder", type=Path, default=Path("runs/faults"), help="Folder of the runs.")
    parser.add_argument("--processes", type=int, default=2, help="Number of cases at a time.")
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    set_environment(folder)
    from experiment.self_check.faults import FAULTS
    from experiment.self_check.variants import GOOD, VARIANTS

    part, parts = map(int, arguments.part.split("/"))
    names = [name for name in FAULTS if arguments.only is None or name in arguments.only][part - 1 :: parts]
    if unknown := set(arguments.only or ()) - set(FAULTS):
        raise SystemExit(
            f"no fault is named {', '.join(sorted(unknown))}; use names such as {', '.join([*FAULTS][:3])}"
        )
    variants = [name for name in GOOD if arguments.only is None or name in {FAULTS[each].variant for each in names}]
    # A prepared checkpoint has one seed.
    good = [("good", variant, seed) for seed in range(99) for variant in variants if not seed or variant != "resumed"]
    good, faults = good[: arguments.good], [("fault", FAULTS[name].variant, name) for name in names]
    # The effects of faults are seen in comparison with the first run of each variant.
    cases = [*good[: len(variants)], *faults, *good[len(variants) :]]

    code = compute_digest(*INJECTED.glob("*.py"))
    stored = read_results(arguments.json)
    results = {name: result for name, result in stored.items() if result["code"] == code}
    if len(results) < len(stored):
        print(f"{len(stored) - len(results)} results of other code do not count", flush=True)
    done = {name for name, result in results.items() if not arguments.again or is_as_it_should_be(result)}
    pending = [case for case in cases if get_case_name(case) not in done]
    needed = {variant for _, variant, _ in pending}
    needed |= {each for variant in needed for each in VARIANTS[variant].needs}
    start_time = time.monotonic()
    sources = folder / f"sources-{compute_source_digest()}"
    prepare(sources, [name for name in VARIANTS if name in needed], code, arguments.processes)
    for case, result in run_cases(run_case, [(case, sources, code) for case in pending], arguments.processes):
        name = get_case_name(case[0])
        result |= describe_case(case[0])
        old_effect = {key: value for key, value in results.get(name, {}).items() if key == "effect"}
        results[name] = old_effect | result | {"code": code}
        print(describe(name, results[name]), flush=True)
        write_results(arguments.json, results)
    shown = {name: results[name] for name in map(get_case_name, cases) if name in results}
    print(f"\n{format_table(shown)}\n{summarize(shown)}; {time.monotonic() - start_time:.0f} s")


def set_environment(folder: Path) -> None:
    """Let all processes share compiled programs, compile quickly and import the tests' modules."""
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "TQDM_DISABLE": "1",
    }
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from support.quick_compilation import set_quick_flags

    set_quick_flags()


def compute_source_digest() -> str:
    """Return a digest of the part of the code that prepared files depend on."""
    package = (ROOT / "dit_video").rglob("*.py")
    sources = [path for path in package if path.relative_to(ROOT).as_posix().startswith(SOURCE_FOLDERS)]
    return digest_files([*sources, INJECTED / "variants.py"])


def prepare(folder: Path, variants: list[str], code: str, processes: int) -> None:
    """Prepare the shared files and the variants that are not prepared yet. A checkpoint is of the present code."""
    from experiment.self_check.variants import VARIANTS

    if not (folder / "done").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        for _, result in run_cases(prepare_sources, [(folder,)], 1):
            check_prepared("the sources", result)
        (folder / "done").touch()

    def get_mark(name: str) -> Path:
        return folder / "runs" / f"{name}{f' {code}' if name == 'resumed' else ''}.done"

    for is_trained in (True, False):  # other variants begin with the weights of trained ones
        due = [name for name in variants if VARIANTS[name].is_trained == is_trained]
        due = [name for name in due if not get_mark(name).is_file()]
        for (name, _), result in run_cases(prepare_variant, [(name, folder) for name in due], processes):
            check_prepared(name, result)
            get_mark(name).touch()


def check_prepared(name: str, result: Result) -> None:
    if "error" in result:
        raise SystemExit(f"cannot prepare {name}:\n{result['error']}")


def prepare_sources(folder: Path) -> Result:
    from experiment.self_check import variants

    variants.prepare_sources(folder)
    return {}


def prepare_variant(name: str, folder: Path) -> Result:
    from experiment.self_check import variants

    sources = variants.Sources(folder)
    shutil.rmtree(sources.get_run(name), ignore_errors=True)
    variants.prepare_variant(name, sources)
    return {}


def get_case_name(case: tuple[str, str, Any]) -> str:
    """Return the name of a case: that of the fault, or of the variant and the seed of a run without one."""
    kind, variant, name = case
    return name if kind == "fault" else f"no fault, {variant}, seed {name}"


def describe_case(case: tuple[str, str, Any]) -> Result:
    """Return what is known of a case before it is run."""
    from experiment.self_check.faults import FAULTS

    kind, variant, name = case
    if kind == "good":
        return {"kind": kind, "variant": variant}
    fault = FAULTS[name]
    return {
        "kind": kind,
        "variant": variant,
        "layer": fault.layer,
        "checks": sorted(fault.checks),
        "mistake": fault.mistake,
    }


def run_case(case: tuple[str, str, Any], sources: Path, code: str) -> Result:
    """Train a run, with or without a fault, and return the problems that it names and the effect of the fault."""
    from experiment.self_check import variants
    from experiment.self_check.faults import FAULTS

    from dit_video.experiment.run import Run

    kind, variant, name = case
    run_folder = sources / "cases" / get_case_name(case).replace(",", "").replace(" ", "-")
    shutil.rmtree(run_folder, ignore_errors=True)
    seed = name if kind == "good" else 0
    run = variants.start_run(variant, variants.Sources(sources), run_folder, seed=seed)
    result: Result = {}
    if kind == "fault":
        FAULTS[name].inject(run)
    Run.open(run_folder).run_stages()
    chain = read_lines(run_folder / "denoiser" / "hash_chain.jsonl")
    reference = sources / "cases" / f"{variant}-{code}.json".replace(" ", "-")
    if kind == "good" and not seed:
        reference.write_text(json.dumps(chain))
    elif kind == "fault" and (reference := find_reference(reference)):
        result["effect"] = describe_effect(json.loads(reference.read_text()), chain)
    problems = run_folder / "denoiser" / "self_check.jsonl"
    result["checked"] = problems.is_file()
    lines = read_lines(problems) if problems.is_file() else []
    # Results are committed, without the place of this machine's folder.
    result["problems"] = [line | {"message": line["message"].replace(f"{sources}/", "")} for line in lines]
    losses = [entry["loss"] for entry in read_lines(run_folder / "denoiser" / "metrics.jsonl")]
    result["losses"] = [round(loss, 4) for loss in losses]
    shutil.rmtree(run_folder)
    return result


def find_reference(path: Path) -> Path | None:
    """Return the run without a fault to compare with: of the present code, or of the code before that."""
    others = path.parent.glob(f"{path.name.rpartition('-')[0]}-*.json")
    return path if path.is_file() else max(others, key=lambda other: other.stat().st_mtime, default=None)


def read_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def describe_effect(good: list[Any], faulty: list[Any]) -> str:
    """Return what differs from a run without a fault, and at which step first; empty if nothing does."""
    effects = []
    for name in ("batch", "loss"):
        pairs = zip(
            *({r["step"]: r[name] for r in chain if name in r}.items() for chain in (good, faulty)), strict=False
        )
        if step := next((left[0] for left, right in pairs if left != right), None):
            effects.append(f"{name} from step {step}")
    states = [next(r["state"] for r in reversed(chain) if "state" in r) for chain in (good, faulty)]
    paths = {path for path in {**states[0], **states[1]} if states[0].get(path) != states[1].get(path)}
    if kinds := sorted({path.split("/")[0] for path in paths}):
        effects.append(f"state ({', '.join(kinds)})")
    return "; ".join(effects)


def run_cases(
    function: Callable[..., Result], cases: list[tuple[Any, ...]], processes: int
) -> Iterator[tuple[tuple[Any, ...], Result]]:
    """Yield each case with its result, computed in a process of its own that has imported what it needs."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["experiment.self_check.faults", "experiment.self_check.variants"])
    waiting, running = list(reversed(cases)), []
    while waiting or running:
        while waiting and len(running) < processes:
            case = waiting.pop()
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=compute, args=(function, case, theirs))
            process.start()
            theirs.close()
            running.append((case, process, ours, time.monotonic()))
        for entry in list(running):
            case, process, ours, start = entry
            seconds = time.monotonic() - start
            if ours.poll() or not process.is_alive() or seconds > MAX_SECONDS:
                try:
                    result = ours.recv() if ours.poll() else {"error": f"no result after {seconds:.0f} s"}
                except EOFError:
                    result = {"error": "the process ended without a result"}
                if process.is_alive() and seconds > MAX_SECONDS:
                    process.kill()
                process.join()
                running.remove(entry)
                yield case, result | {"seconds": round(time.monotonic() - start, 1)}
        time.sleep(0.05)


def compute(function: Callable[..., Result], case: tuple[Any, ...], connection: Any) -> None:
    """Send the result of a function, whose output goes to the error message of a case that fails."""
    log = Path(os.environ["JAX_COMPILATION_CACHE_DIR"]).parent / f"output-{os.getpid()}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        result = function(*case)
    except BaseException:
        result = {"error": f"{log.read_text()[-1000:]}\n{traceback.format_exc()[-4000:]}"}
    log.unlink()
    connection.send(result)
    connection.close()


def read_results(path: Path) -> dict[str, Result]:
    return json.loads(path.read_text())["results"] if path.is_file() else {}


def write_results(path: Path, results: dict[str, Result]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(
        json.dumps({"summary": summarize(results), "results": results}, indent=1, ensure_ascii=False) + "\n"
    )
    temporary.replace(path)


def list_named(result: Result) -> list[str]:
    """Return the checks of a result's problems."""
    return sorted({problem["check"] for problem in result.get("problems", [])})


def is_named(result: Result) -> bool:
    """Return whether a problem has a check of the fault."""
    return bool(set(list_named(result)) & set(result.get("checks", ())))


def is_as_it_should_be(result: Result) -> bool:
    if "error" in result:
        return False
    return not result["problems"] if result["kind"] == "good" else is_named(result) and result.get("effect") != ""


def describe(name: str, result: Result) -> str:
    """Return a line of the table."""
    checks, outcome = ", ".join(list_named(result)), ""
    if "error" in result:
        outcome = f"ERROR {result['error'].strip().splitlines()[-1][:110]}"
    elif result["kind"] == "good":
        outcome = f"FALSE ALARM {checks}" if checks else "no problem"
    else:
        outcome = ("named by " if is_named(result) else "MISSED, named by ") + (checks or "nothing")
        first = min((each["step"] for each in result["problems"] if each["check"] in result["checks"]), default=None)
        outcome += "" if first is None else f" at step {first}"
        outcome += " (NO EFFECT)" if result.get("effect") == "" else ""
    return f"{name:34} {result.get('layer', '-'):10} {result['variant']:14} {result['seconds']:6.1f} s  {outcome}"


def format_table(results: dict[str, Result]) -> str:
    lines = [describe(name, result) for name, result in results.items()]
    bad = [line for line in lines if any(word in line for word in ("MISSED", "FALSE ALARM", "ERROR", "NO EFFECT"))]
    return "\n".join(["", *lines, "", "not as they should be:", *(bad or ["none"]), ""])


def summarize(results: dict[str, Result]) -> str:
    faults = [result for result in results.values() if result["kind"] == "fault"]
    good = [result for result in results.values() if result["kind"] == "good"]
    silent = [result for result in faults if "error" not in result]
    alarms = sum(bool(result.get("problems")) for result in good)
    return (
        f"{sum(map(is_named, silent))} of {len(faults)} faults named, {len(faults) - len(silent)} ended with an error, "
        f"{sum(result.get('effect') == '' for result in silent)} without an effect; "
        f"{alarms} false alarms in {len(good)} runs without a fault"
    )


if __name__ == "__main__":
    main()
