"""Train with four processes that fail at random, on storage that fails at random, and check the result.

    python .ci/chaos_harness.py 50 --json .ci/chaos.json
    python .ci/chaos_harness.py 5 --seed 0

Each process stands for a machine with a disk of its own, and the run is in a bucket alone: a server of Google Cloud
Storage's API, `tests/support/fake_gcs.py`. One training is not disturbed. Then there are rounds of two trainings that
are, at random moments: one with four processes all the time, and one whose number of processes changes. The methods of
`chaos_disturbances.Chaos` are the kinds of disturbances. One counts if the fault had its effect, and as recovered if a
later step than all before it was logged afterwards.

In the end, each first training has the undisturbed one's hash chain and final arrays, bit for bit, and each second one
its losses to 1e-6 and its parameters to 2e-5. Goodput is what the runs record themselves. What is in the file of
results counts already, so that the command may be interrupted, except recoveries in a training that was not compared.
"""

import argparse
import dataclasses
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
from chaos_cluster import SILENCE, Cluster, make_environment  # noqa: E402
from chaos_disturbances import MAX_STARTS, MISTAKE, PROCESS_COUNTS, Chaos, Event  # noqa: E402
from code_digest import compute_digest  # noqa: E402

from support.fake_gcs import FakeGcs, serve  # noqa: E402

PROCESSES = 4
STEPS = 100
KINDS = (
    "kill",
    "kill_starting",
    "freeze",
    "hang",
    "pause",
    "suspend",
    "preempt",
    "damage",
    "outage",
    "flaky",
    "slow",
    "deny",
)
TRAININGS = ("fixed", "resized")
"""Trainings of a round: one with as many processes all the time, and one whose number of processes changes."""
LOSSES = ("kill", "kill_starting", "freeze", "hang", "suspend", "damage", "flaky", "remove")
"""Kinds by which a process is lost, or silent for as long as a lost one."""
TOLERATED = ("pause", "slow")
"""Kinds after which no process may end."""
MAX_PAUSE_STEPS, MAX_PAUSE_SECONDS = 6, 1.0
"""Most steps, and then seconds, between a recovery and the next disturbance."""
MAX_LOSS_DIFFERENCE, MAX_PARAMETER_DIFFERENCE = 1e-6, 2e-5
"""Relative difference of losses, and absolute one of parameters, with other numbers of processes."""
MAX_KEY_BIAS_DIFFERENCE = 1e-4 / 40
"""Absolute difference of biases of keys for each step: their gradient is zero, so that Adam amplifies its rounding."""
Chain = list[dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("disturbances", type=int, help="Number of disturbances, with those in the file of results.")
    parser.add_argument("--per-round", type=int, default=10, help="Disturbances of a round of trainings.")
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS, help="Kinds, besides added and removed.")
    parser.add_argument("--folder", type=Path, default=Path("runs/chaos"), help="Compiled programs, and all outputs.")
    parser.add_argument("--json", type=Path, default=None, help="File of the results, which is continued.")
    parser.add_argument("--seed", type=int, default=None, help="Seed of the disturbances; a new one by default.")
    parser.add_argument("--steps", type=int, default=STEPS, help="Steps of each training.")
    parser.add_argument("--trainings", nargs="+", default=TRAININGS, choices=TRAININGS, help="Trainings of each round.")
    parser.add_argument("--processes", type=int, default=PROCESSES, help="Processes that each training begins with.")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="Time after which no round begins.")
    arguments = parser.parse_args()
    start = time.monotonic()
    path = arguments.json
    code = compute_digest(*Path(__file__).parent.glob("chaos_*.py"))
    stored = json.loads(path.read_text())["rounds"] if path and path.exists() else []
    rounds = [each for each in stored if each.get("code") == code]
    if len(rounds) < len(stored):
        print(f"{len(stored) - len(rounds)} rounds of other code do not count", flush=True)
    folder = arguments.folder.absolute()
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "programs")
    with serve() as bucket:
        trainings = folder / time.strftime("%Y%m%d-%H%M%S")
        harness = Harness(trainings, bucket, steps=arguments.steps, processes=arguments.processes)
        harness.prepare()
        while (missing := arguments.disturbances - len(list_events(rounds))) > 0:
            if time.monotonic() - start > 60 * arguments.minutes:
                break
            seed = time.time_ns() % 2**32 if arguments.seed is None else arguments.seed + len(rounds)
            results: dict[str, Any] = {
                "code": code,
                "seed": seed,
                "undisturbed": harness.goodput,
                "missed": [],
                "events": [],
            }
            rounds.append(results)

            def save() -> None:
                if path:
                    path.write_text(
                        json.dumps({"summary": summarize_rounds(rounds), "rounds": rounds}, indent=1) + "\n"
                    )

            harness.run_round(results, min(missing, arguments.per_round), arguments.trainings, arguments.kinds, save)
    print(f"{format_table(rounds)}\n{(time.monotonic() - start) / 60:.0f} minutes")
    if summarize_rounds(rounds)["recovered"] < arguments.disturbances:
        raise SystemExit(1)


class Harness:
    """The bucket, and the trainings in it."""

    def __init__(self, folder: Path, bucket: FakeGcs, *, steps: int, processes: int):
        self.folder, self.bucket, self.steps, self.processes = folder, bucket, steps, processes
        self.undisturbed: dict[str, Any] = {}
        self.goodput: dict[str, Any] = {}

    def prepare(self) -> None:
        """Make the data that all trainings start from, and train without disturbances."""
        program = Path(__file__).with_name("chaos_training.py")
        command = [sys.executable, str(program), "prepare", get_address("prepared"), "--steps", str(self.steps)]
        command += ["--silence", str(SILENCE), "--clips", str(self.folder / "clips")]
        environment = {**make_environment(), "XDG_CACHE_HOME": str(self.folder / "prepared")}
        subprocess.run(command, env=environment, check=True)
        cluster = self.make_cluster("undisturbed")
        cluster.start()
        codes, _ = wait_for_success(cluster)
        print(f"undisturbed: {codes}", flush=True)
        self.undisturbed = self.read_result("undisturbed")
        self.goodput = read_goodput("undisturbed")
        print(f"undisturbed: goodput {self.goodput['goodput']:.1%}", flush=True)

    def make_cluster(self, name: str) -> Cluster:
        for source in self.bucket.list_names("runs/prepared/"):
            target = f"runs/{name}/{source.removeprefix('runs/prepared/')}"
            self.bucket.objects[target] = dataclasses.replace(self.bucket.objects[source], name=target)
        return Cluster(get_address(name), self.folder / name, steps=self.steps, count=self.processes)

    def run_round(
        self,
        results: dict[str, Any],
        count: int,
        trainings: Sequence[str],
        kinds: Sequence[str],
        save: Callable[[], None],
    ) -> None:
        """Disturb the trainings, and add what comes of it to the results, which are saved each time."""
        seed = results["seed"]
        chosen, start = random.Random(seed), time.monotonic()
        for index, training in enumerate(trainings):
            number = (count + len(trainings) - 1 - index) // len(trainings)
            name = f"{training}-{seed}"
            cluster = self.make_cluster(name)
            if number:
                for event in self.disturb(cluster, training, chosen, number, kinds):
                    results["events" if event.hit else "missed"].append(dataclasses.asdict(event))
                    save()
                result = self.read_result(name)
                compare = compare_bits if training == "fixed" else compare_values
                results[training] = {**read_goodput(name), "starts": cluster.starts}
                results[training] |= compare(self.undisturbed, result)
                print(f"{training}: {results[training]}", flush=True)
                save()
        results["minutes"] = (time.monotonic() - start) / 60
        save()

    def disturb(
        self, cluster: Cluster, training: str, chosen: random.Random, count: int, kinds: Sequence[str]
    ) -> Iterator[Event]:
        """Train to the end with so many disturbances that count, and yield these and the others."""
        hits = 0
        chaos = Chaos(cluster, self.bucket, chosen)
        cluster.start()
        coming: list[str] = []
        while hits < count:
            if not coming:
                coming = chosen.sample(kinds, len(kinds))
            first, steps = cluster.get_newest_step(), chosen.randint(1, MAX_PAUSE_STEPS)
            if not cluster.wait_for(lambda: cluster.get_newest_step() >= first + steps):  # noqa: B023  # it ends here
                raise SystemExit(f"{training}: a process ended: {cluster.wait_for_end()}\n{format_outputs(cluster)}")
            time.sleep(chosen.uniform(0.0, MAX_PAUSE_SECONDS))
            kind = coming.pop(0)
            if training == "resized" and chosen.random() < 0.5:
                can_shrink, can_grow = cluster.count > PROCESS_COUNTS[0], cluster.count < PROCESS_COUNTS[-1]
                kind = chosen.choice(["remove"] * can_shrink + ["add"] * can_grow)
            step, begin = cluster.get_newest_step(), time.time()
            event = Event(kind=kind, training=training, processes=cluster.count, step=step, begin=begin)
            getattr(chaos, kind)(event)
            recover(cluster, event)
            state = f"recovered after {event.seconds:.0f} s" if event.recovered else "NOT RECOVERED"
            what = f"{kind} after step {step}: {event.detail}; {state}; exit codes {event.codes}, {event.hung} hung"
            print(f"{training}: {what}{'' if event.hit else ', BUT NOT HIT'}", flush=True)
            hits += event.hit
            yield event
            if not event.recovered:
                raise SystemExit(f"see the outputs of the last {len(event.codes) + 1} starts in {cluster.folder}")
        wait_for_success(cluster)

    def read_result(self, name: str) -> dict[str, Any]:
        """Return the hash chain and the final arrays of a training."""
        import jax
        import orbax.checkpoint as ocp

        from dit_video.core import trees
        from dit_video.training.hooks.hash_chain import read_chain

        path = self.folder / f"{name}.jsonl"
        path.write_bytes(self.bucket.objects[f"runs/{name}/denoiser/hash_chain.jsonl"].content)
        address = f"{get_address(name)}/checkpoints/denoiser/{self.steps}/state"
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            tree = checkpointer.metadata(address).item_metadata.tree
            options = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            state = checkpointer.restore(address, args=ocp.args.PyTreeRestore(restore_args=options))
        return {"chain": read_chain(path), "arrays": trees.flatten(state)}


def recover(cluster: Cluster, event: Event) -> None:
    """Start the training as often as it needs to get beyond the disturbance, and note when it does."""
    end = time.time()
    for _ in range(MAX_STARTS):
        if not cluster.is_whole:
            cluster.start()
        if cluster.wait_for(lambda: cluster.find_first_step(beyond=event.step, since=end) is not None):
            break
        codes, hung = cluster.wait_for_end()
        event.codes.append(codes)
        event.hung += hung
        if codes == [0] * len(codes):  # no steps were left
            break
    first = cluster.find_first_step(beyond=event.step, since=end)
    codes = {code for codes in event.codes for code in codes}
    is_orderly = not codes & {1, -signal.SIGSEGV} and (MISTAKE not in codes or event.kind == "deny")
    # JAX aborts processes only where one was lost.
    is_orderly &= -signal.SIGABRT not in codes or event.kind in LOSSES
    event.recovered = first is not None and is_orderly and not (event.codes and event.kind in TOLERATED)
    if first is not None:
        event.seconds = first.time - event.begin
        if event.codes and event.kind != "flaky":
            cluster.start_seconds = first.time - cluster.start_time


def wait_for_success(cluster: Cluster) -> tuple[list[int], int]:
    """Wait until all processes have ended, and raise an error unless the training is complete."""
    cluster.wait_for(lambda: False, 1800.0)
    codes, hung = cluster.wait_for_end()
    if codes != [0] * len(codes):
        raise SystemExit(f"the training ended with {codes}:\n{format_outputs(cluster)}")
    return codes, hung


def compare_bits(expected: dict[str, Any], actual: dict[str, Any]) -> dict[str, Any]:
    """Compare a training with as many processes, which may have saved at further steps."""
    chains = [[strip_link(record) for record in result["chain"]] for result in (expected, actual)]
    missing = [record for record in chains[0] if record not in chains[1]]
    steps = [sum("batch" in record for record in chain) for chain in chains]
    different = [
        path
        for path, array in expected["arrays"].items()
        if path not in actual["arrays"] or array.tobytes() != actual["arrays"][path].tobytes()
    ]
    if missing or different or steps[0] != steps[1]:
        raise SystemExit(f"bits differ: {missing[:3]}, {different[:3]}, {steps} steps")
    return {"equal_records": len(chains[0]), "equal_arrays": len(expected["arrays"])}


def compare_values(expected: dict[str, Any], actual: dict[str, Any]) -> dict[str, Any]:
    """Compare a training with other numbers of processes."""
    steps, actual_steps = (
        {record["step"]: record for record in result["chain"] if "batch" in record} for result in (expected, actual)
    )
    if any(actual_steps[step]["batch"] != record["batch"] for step, record in steps.items()):
        raise SystemExit("the resized training has other batches")
    pairs = [(float.fromhex(steps[step]["loss"]), float.fromhex(actual_steps[step]["loss"])) for step in steps]
    losses = max(abs(new - old) / abs(old) for old, new in pairs)
    expected_params, actual_params = (dict(list_params(result["arrays"])) for result in (expected, actual))
    differences = {path: float(np.abs(array - actual_params[path]).max()) for path, array in expected_params.items()}
    key_biases = {path: differences.pop(path) for path in expected_params if path.endswith(("qkv/bias/1", "k/bias"))}
    worst = max(differences, key=lambda path: differences[path])
    key_bias = max(key_biases.values(), default=0.0)
    is_close = differences[worst] <= MAX_PARAMETER_DIFFERENCE and key_bias <= MAX_KEY_BIAS_DIFFERENCE * len(steps)
    if losses > MAX_LOSS_DIFFERENCE or not is_close:
        other = f"{worst} by {differences[worst]:.1e}, biases of keys by {key_bias:.1e}"
        raise SystemExit(f"losses differ by {losses:.1e}, {other}")
    return {
        "loss_difference": losses,
        "parameter_difference": differences[worst],
        "parameter": worst,
        "key_bias_difference": key_bias,
    }


def list_params(arrays: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the parameters, and biases of queries, keys and values, which are one array, apart."""
    for path, array in arrays.items():
        if path.startswith("params/") and path.endswith("qkv/bias"):
            yield from ((f"{path}/{index}", part) for index, part in enumerate(np.split(array, 3, axis=-1)))
        elif path.startswith("params/"):
            yield path, array


def strip_link(record: dict[str, Any]) -> dict[str, Any]:
    """Return what was computed, and not when the training was started."""
    return {name: value for name, value in record.items() if name not in ("link", "start")}


def get_address(name: str) -> str:
    return f"gs://bucket/runs/{name}"


def read_goodput(name: str) -> dict[str, Any]:
    """Return where the time of a run went, as it has recorded it, since its latents were made."""
    from dit_video.training.goodput import GOODPUT_FOLDER, GROUPS, get_group, read_attempts, summarize

    _preparation, *attempts = read_attempts(f"{get_address(name)}/{GOODPUT_FOLDER}")
    times = summarize(attempts)
    groups = dict.fromkeys(GROUPS, 0.0)
    for category, microseconds in times.microseconds.items():
        groups[get_group(category)] += microseconds / times.total
    return {"goodput": times.goodput, "seconds": times.total / 1e6, "attempts": len(times.attempts), "shares": groups}


def format_outputs(cluster: Cluster) -> str:
    return "\n".join(f"process {index}:\n{text[-3000:]}" for index, text in enumerate(cluster.read_outputs()))


def list_events(rounds: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the disturbances that count: those of trainings that were compared, and all without a recovery."""
    events = [(each, event) for each in rounds for event in (*each["events"], *each["missed"])]
    is_valid = [(event["hit"] and event["training"] in each) or not event["recovered"] for each, event in events]
    return [event for (_, event), valid in zip(events, is_valid, strict=True) if valid]


def summarize_rounds(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the counts of all disturbances, and the times of recovery of each kind."""
    events = list_events(rounds)
    kinds: dict[str, list[dict[str, Any]]] = {}
    for event in events:
        kinds.setdefault(event["kind"], []).append(event)
    table = {}
    for kind, group in sorted(kinds.items()):
        seconds = [event["seconds"] for event in group]
        table[kind] = {
            "count": len(group),
            "recovered": sum(event["recovered"] for event in group),
            "median_seconds": round(statistics.median(seconds), 1),
            "max_seconds": round(max(seconds), 1),
            "hung": sum(event["hung"] for event in group),
        }
    return {"count": len(events), "recovered": sum(event["recovered"] for event in events), "kinds": table}


def format_table(rounds: Sequence[dict[str, Any]]) -> str:
    summary = summarize_rounds(rounds)
    lines = [f"{summary['recovered']} of {summary['count']} recovered"]
    lines += [f"| {kind} | {' | '.join(map(str, row.values()))} |" for kind, row in summary["kinds"].items()]
    for training in ("undisturbed", "fixed", "resized"):
        goodput = [each[training]["goodput"] for each in rounds if training in each]
        if goodput:
            lines.append(f"goodput of the {training} trainings: {', '.join(f'{share:.1%}' for share in goodput)}")
    return "\n".join(lines)


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
