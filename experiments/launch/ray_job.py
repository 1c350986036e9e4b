"""Train on the nodes of a Ray cluster of GPUs (or CPUs), with one process on each node.

    python experiments/launch/ray_job.py --nodes 2 --gpus 8 -- experiments/configs/clips.py --data CLIPS --workdir RUN

Arguments after `--` are for experiments/train.py, or for another script: `--script experiments/finetune.py`. The
run's folder must be on a file system that all nodes share. Ray runs the program on the cluster of RAY_ADDRESS, such as
in a Ray job (see ray_job.yaml), or on this machine.

If a node is lost, a process is killed or ends with exit code 75, all start again, when there are enough nodes. Exit
code 2, a user error, is final. SIGTERM and Ctrl-C let the training save and exit.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from dit_video.core.errors import EXIT_TRY_AGAIN, UserError

ROOT = Path(__file__).resolve().parents[2]


class TrainingProcess:
    """A training's process on a node, started and ended by a Ray actor."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._is_stopping = False

    def find_address(self) -> str:
        """Return an address of this node that is free, for process 0."""
        with socket.socket() as free:
            free.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"

    def run(self, command: Sequence[str], environment: dict[str, str], root: str) -> int:
        """Run the command with this node's Python; return its exit code."""
        # A job's working directory (`ray job submit --working-dir .`) has another path on each node.
        folder = "." if Path(command[0]).is_file() else root
        line = [sys.executable, "-u", *command]
        self._process = subprocess.Popen(line, env=os.environ | environment, cwd=folder)
        if self._is_stopping:
            self.stop()
        return self._process.wait()

    def stop(self) -> None:
        """Let the training save and exit."""
        self._is_stopping = True
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)


def run_once(arguments: argparse.Namespace, stop: threading.Event) -> list[int]:
    """Run all processes until they end; return their exit codes, 128 + SIGKILL for one that was lost."""
    bundles = [{"CPU": arguments.cpus, "GPU": arguments.gpus}] * arguments.nodes
    group = placement_group(bundles, strategy="STRICT_SPREAD")
    try:
        while not group.wait(timeout_seconds=10):
            if stop.is_set():
                return [EXIT_TRY_AGAIN]
            print(f"waiting for {arguments.nodes} nodes with {bundles[0]}", file=sys.stderr, flush=True)
        processes = [start_actor(group, index, arguments) for index in range(arguments.nodes)]
        environment = {"COORDINATOR_ADDRESS": ray.get(processes[0].find_address.remote())}
        environment["NUM_PROCESSES"] = str(arguments.nodes)
        environment["DIT_VIDEO_PREEMPTION_GRACE"] = str(arguments.grace)
        # An exit code that tells a stopped run from a finished one.
        command = [arguments.script, *arguments.arguments, "--stopped-code", str(EXIT_TRY_AGAIN)]
        running = [
            process.run.remote(command, environment | {"PROCESS_ID": str(index)}, str(ROOT))
            for index, process in enumerate(processes)
        ]
        return wait_for_all(running, processes, stop)
    except ray.exceptions.RayError as error:  # a node is lost before the processes run
        print(f"error: {error}", file=sys.stderr)
        return [EXIT_TRY_AGAIN]
    finally:
        remove_placement_group(group)


def start_actor(group: Any, index: int, arguments: argparse.Namespace) -> Any:
    """Start the actor of one process, with all resources of its node that the run was promised."""
    place = PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=index)
    options = {"num_cpus": arguments.cpus, "num_gpus": arguments.gpus, "scheduling_strategy": place}
    # Two calls at once: `stop` while `run` waits.
    return ray.remote(TrainingProcess).options(max_concurrency=2, **options).remote()


def wait_for_all(running: list[Any], processes: list[Any], stop: threading.Event) -> list[int]:
    """Return the exit codes of all processes, which stop once the event is set."""
    remaining, codes, is_stopping = list(running), [], False
    while remaining:
        if stop.is_set() and not is_stopping:
            is_stopping = True
            for process in processes:
                process.stop.remote()
        ended, remaining = ray.wait(remaining, timeout=1)
        for each in ended:
            try:
                codes.append(ray.get(each))
            except ray.exceptions.RayError as error:  # the node or the actor is lost; the other processes notice
                print(f"error: process {running.index(each)} is lost: {error}", file=sys.stderr, flush=True)
                codes.append(128 + signal.SIGKILL)
    # A process that a signal ended has a negative code.
    return [code if code >= 0 else 128 - code for code in codes]


def main() -> int:
    """Run the processes again until they have finished; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, required=True, help="number of nodes, with one process on each")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs of a node, all of which its process uses")
    parser.add_argument("--cpus", type=int, default=1, help="CPUs of a node that Ray reserves for its process")
    parser.add_argument("--script", default="experiments/train.py", help="script to run")
    parser.add_argument("--max-restarts", type=int, default=50, help="number of restarts after which the job ends")
    parser.add_argument("--grace", type=float, default=100.0, help="seconds to save and exit after SIGTERM")
    parser.add_argument("arguments", nargs="+", help="arguments of the script, after --")
    arguments = parser.parse_args()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    ray.init(log_to_driver=True)
    # Ray has handlers of its own, which end the driver at once.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    for restarts in range(arguments.max_restarts + 1):
        codes = run_once(arguments, stop)
        if not any(codes):
            return 0
        if UserError.code in codes:
            return UserError.code
        if stop.is_set():
            return EXIT_TRY_AGAIN
        print(f"exit codes {codes} after {restarts} restarts", file=sys.stderr, flush=True)
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
