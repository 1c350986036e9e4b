"""Kill a training again and again, and check that its result does not change.

    python .ci/kill_harness.py 100 --folder /tmp/kills
    python .ci/kill_harness.py 20 --seed 0

A tiny experiment (clips, latents, then a denoiser trained on packed rows through the real loader, saved in the
background every three steps) is trained once without interruption. Then it is trained again while its processes are
killed (SIGKILL) at random moments: while it starts, restores, computes, logs or, most of the time, saves. The same
command continues it each time. In the end its log and every array of its last checkpoint are compared bit by bit with
the uninterrupted run. This is repeated until the requested number of kills is reached. The folder can be reused: the
prepared data and the uninterrupted run of this code stay in it.
"""

import argparse
import dataclasses
import hashlib
import importlib.util
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from code_digest import compute_digest

ROOT = Path(__file__).resolve().parents[1]
STEPS, SAVE_EVERY, BATCH = 120, 3, 2
MAX_SECONDS = 3600
"""Time limit of a training that is not killed."""
TIMING_ENTRIES = re.compile("seconds|wait|per_second|memory|mfu|utilisation|goodput|badput")
"""Names of log entries that depend on a clock or on the machine, and are not compared."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kills", type=int, help="Number of kills.")
    parser.add_argument("--folder", type=Path, default=Path("runs/kills"))
    parser.add_argument("--json", type=Path, default=None, help="File of the results, which is continued.")
    parser.add_argument("--seed", type=int, default=None, help="Seed of the random moments; a new one by default.")
    arguments = parser.parse_args()
    seed = time.time_ns() % 2**32 if arguments.seed is None else arguments.seed
    moments = random.Random(seed)
    folder = arguments.folder.absolute() / compute_digest(Path(__file__))
    uninterrupted = folder / "whole"
    ensure_prepared(folder / "prepared")
    if not (uninterrupted / "done").is_file():
        reset_run(folder / "prepared", uninterrupted)
        start_time = time.monotonic()
        run_until_killed(uninterrupted, None)
        print(
            f"uninterrupted run: {STEPS} steps in {time.monotonic() - start_time:.0f} s including its start", flush=True
        )
    expected = read_result(uninterrupted)
    results = read_results(arguments.json)
    runs, kill_counts = results["runs"], Counter[str](results["kills"])
    done = kill_counts.total()
    while done < arguments.kills:
        run = folder / "killed"
        reset_run(folder / "prepared", run)
        while when := run_until_killed(run, moments if done < arguments.kills else None):
            done += 1
            kill_counts[when] += 1
            print(f"kill {done} {when}; its newest checkpoint is of step {get_newest_step(run)}", flush=True)
        runs += 1
        compare(expected, read_result(run), run)
        print(f"run {runs}: after {done} kills, its log and arrays equal those of the uninterrupted run", flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps({**results, "runs": runs, "kills": kill_counts}, indent=1) + "\n")
    summary = ", ".join(f"{count} {when}" for when, count in kill_counts.most_common())
    print(f"{done} kills in {runs} runs ({summary}; seed {seed}): no bit differs")


def read_results(path: Path | None) -> dict[str, Any]:
    """Return the results of this code, which has to be the same from the first kill to the last."""
    code = compute_digest(Path(__file__))
    stored = json.loads(path.read_text()) if path and path.exists() else {}
    if stored and stored["code"] != code:
        print(f"{sum(stored['kills'].values())} kills of other code do not count", flush=True)
    return stored if stored.get("code") == code else {"code": code, "runs": 0, "kills": {}}


def run_until_killed(run: Path, moments: random.Random | None) -> str:
    """Start the training and kill it at a random moment of `moments`; return when, or "" if it ended by itself."""
    with (run / "output.txt").open("a") as output:
        process = subprocess.Popen(
            [sys.executable, __file__, "train", str(run)],
            env=make_environment(run.parent),
            stdout=subprocess.PIPE,
            stderr=output,
            text=True,
            start_new_session=True,
        )
        assert process.stdout is not None
        process.stdout.readline()  # blocks until the imports are done
        when = "" if moments is None else wait_for_moment(process, run, moments)
        if when:
            os.killpg(process.pid, signal.SIGKILL)
        elif process.wait(MAX_SECONDS) != 0:
            raise SystemExit(f"a start failed instead of continuing:\n{(run / 'output.txt').read_text()[-4000:]}")
        process.wait()
    return when


def wait_for_moment(process: subprocess.Popen, run: Path, moments: random.Random) -> str:
    """Wait for a random moment of the start, or some saves later; return which, or "" if the training ended."""
    if moments.random() < 0.2:
        time.sleep(moments.uniform(0.0, 6.0))
        return "" if process.poll() is not None else "while it started"
    goal = get_newest_step(run) + SAVE_EVERY * moments.randint(1, 5)
    while get_newest_step(run) < goal:
        if process.poll() is not None:
            return ""
        time.sleep(0.01)
    time.sleep(moments.uniform(0.0, 0.3))
    writing = any(path.name.endswith(".orbax-checkpoint-tmp") for path in get_checkpoint_folder(run).glob("*"))
    return "" if process.poll() is not None else "while it saved" if writing else "while it trained"


def ensure_prepared(folder: Path) -> None:
    """Make clips, a trained autoencoder and its latents, which the training of the denoiser starts from."""
    if not (folder / "done").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        command = [sys.executable, __file__, "prepare", str(folder)]
        subprocess.run(command, env=make_environment(folder.parent), check=True)
        (folder / "done").touch()


def reset_run(source: Path, run: Path) -> None:
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(source, run, symlinks=True)
    (run / "done").unlink()


def make_environment(folder: Path) -> dict[str, str]:
    """Return environment variables that share compiled programs among all starts, so that starts are short."""
    programs = {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    return {"JAX_PLATFORMS": "cpu", **os.environ, **programs, "PYTHONPATH": str(ROOT)}


def get_checkpoint_folder(run: Path) -> Path:
    return run / "run" / "denoiser" / "checkpoints"


def get_newest_step(run: Path) -> int:
    return max((int(path.name) for path in get_checkpoint_folder(run).glob("*") if path.name.isdigit()), default=0)


def read_result(run: Path) -> dict[str, Any]:
    """Return the log without entries that depend on a clock, and digests of all arrays of the last checkpoint."""
    lines = (run / "run" / "denoiser" / "metrics.jsonl").read_text().splitlines()
    log = [
        {name: value for name, value in json.loads(line).items() if not TIMING_ENTRIES.search(name)} for line in lines
    ]
    return {"log": log, "arrays": json.loads((run / "done").read_text())}


def compare(expected: dict[str, Any], actual: dict[str, Any], run: Path) -> None:
    for step, (left, right) in enumerate(zip(expected["log"], actual["log"], strict=False), start=1):
        if left != right:
            raise SystemExit(f"{run}: the log differs at step {step}: {left} uninterrupted, {right} killed")
    if len(expected["log"]) != len(actual["log"]) or len(expected["log"]) != STEPS:
        raise SystemExit(
            f"{run}: the log has {len(actual['log'])} entries, {len(expected['log'])} uninterrupted, for {STEPS} steps"
        )
    if different := [path for path in expected["arrays"] if expected["arrays"][path] != actual["arrays"].get(path)]:
        raise SystemExit(f"{run}: arrays differ: {', '.join(different)}")


def load_tiny_module() -> Any:
    """Load the module of the tests' tiny experiment."""
    specification = importlib.util.spec_from_file_location("tiny", ROOT / "tests" / "support" / "tiny.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def make_experiment(config: Any) -> Any:
    experiment = config.replace_stage("denoiser", steps=STEPS, batch=BATCH)
    return dataclasses.replace(experiment, log_every=1, save_every=SAVE_EVERY)


def prepare(folder: Path) -> None:
    from dit_video.experiment.run import Run
    from dit_video.scenes import shapes

    module = load_tiny_module()
    clips = shapes.write_folder(folder / "clips", count=module.COUNT, seed=0, sizes=module.SIZES)
    run = Run.create(folder / "run", make_experiment(module.EXPERIMENT))
    run.prepare(clips)
    run.run_stages("autoencoder")
    run.experiment.get_stage("denoiser").encode_latents(run)


def train(folder: Path) -> None:
    import numpy as np
    import orbax.checkpoint as ocp

    from dit_video.core import trees as trees
    from dit_video.experiment.run import Run

    run = Run.open(folder / "run")
    print("begins", flush=True)
    run.run_stages()
    arrays = ocp.StandardCheckpointer().restore(get_checkpoint_folder(folder) / str(STEPS) / "state")
    digests = {
        path: hashlib.sha256(np.asarray(array).tobytes()).hexdigest() for path, array in trees.flatten(arrays).items()
    }
    (folder / "done").write_text(json.dumps(digests))


if __name__ == "__main__":
    if sys.argv[1:2] in (["prepare"], ["train"]):
        {"prepare": prepare, "train": train}[sys.argv[1]](Path(sys.argv[2]))
    else:
        main()
