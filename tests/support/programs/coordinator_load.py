"""Measure what simulated processes of a run cost process 0: heartbeats, polls for a signal, and a wait of all.

The arguments are the numbers of processes. Process 0, which keeps a real coordination service, is this process; the
others are threads of further processes, each with a connection of its own. The output is a JSON list of
`process_count`, `cpu` (seconds per second) and `calls` (per second) of process 0's service, while the processes train
and (`waiting_…`) while all others also wait for process 0.
"""

import itertools
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from dit_video.distributed.faults.heartbeat import HeartbeatMonitor
from dit_video.distributed.faults.store import KeyValueStore
from dit_video.distributed.faults.timeouts import TimeoutConfig
from dit_video.distributed.process_group import ProcessGroup
from dit_video.training.preemption import SharedStopRequest
from support.coordination import RecordingClient, connect, start_service

SECONDS = 15
"""Time of each measurement."""
PROCESSES = 3
"""Number of further processes."""
LIMITS = TimeoutConfig(startup=600.0, max_silence=120.0)


class SimulatedProcess:
    """A process of the run; its work is done by threads."""

    def __init__(self, client, process_id: int, process_count: int) -> None:
        self.client = RecordingClient(client)
        group = ProcessGroup(self.client, process_id, process_count)
        self.monitor = HeartbeatMonitor(LIMITS, group)
        self.stores = KeyValueStore("stop", group), KeyValueStore("turns", group)

    def train(self) -> None:
        """Begin to send heartbeats and to poll for a signal."""
        self.monitor.__enter__()
        self.stop = SharedStopRequest(0, store=self.stores[0])

    def wait_for_first(self) -> None:
        """Begin to wait for the first process."""
        threading.Thread(target=self.stores[1].wait_for, args=["done"], daemon=True).start()


def simulate(address: str, ids: range, process_count: int) -> None:
    """Be the processes with these numbers, by commands of stdin, to each of which the number of calls is the answer."""
    with ThreadPoolExecutor(len(ids)) as pool:
        clients = list(pool.map(lambda process_id: connect(address, process_id), ids))
        processes = [SimulatedProcess(*pair, process_count) for pair in zip(clients, ids, strict=True)]
        print("connected", flush=True)
        for line in sys.stdin:
            if line == "train\n":
                list(pool.map(SimulatedProcess.train, processes))
            elif line == "wait\n":
                list(pool.map(SimulatedProcess.wait_for_first, processes))
            print(sum(process.client.calls.total() for process in processes), flush=True)
        os._exit(0)


def measure(process_count: int) -> dict[str, float]:
    """Return the load of process 0."""
    address, _service = start_service(process_count)
    bounds = [1 + (process_count - 1) * part // PROCESSES for part in range(PROCESSES + 1)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    others = [
        subprocess.Popen([sys.executable, __file__, address, str(start), str(stop), str(process_count)], **pipes)
        for start, stop in itertools.pairwise(bounds)
    ]
    first = SimulatedProcess(connect(address, 0), 0, process_count)

    def ask(command: str) -> int:
        for other in others:
            print(command, file=other.stdin, flush=True)
        if command == "train":
            first.train()
        return first.client.calls.total() + sum(int(other.stdout.readline()) for other in others)

    def measure_load() -> tuple[float, float]:
        time.sleep(3)  # until the start is over
        calls, cpu, start = ask("count"), sum(os.times()[:2]), time.monotonic()
        time.sleep(SECONDS)
        seconds = time.monotonic() - start
        return (sum(os.times()[:2]) - cpu) / seconds, (ask("count") - calls) / seconds

    try:
        for other in others:
            assert other.stdout.readline() == "connected\n"
        ask("train")
        cpu, calls = measure_load()
        ask("wait")
        waiting_cpu, waiting_calls = measure_load()
    finally:
        for other in others:
            other.kill()
    values = {"cpu": cpu, "calls": calls, "waiting_cpu": waiting_cpu, "waiting_calls": waiting_calls}
    return {"process_count": process_count} | {name: round(value, 4) for name, value in values.items()}


def main() -> None:
    """Measure each number of processes in a process of its own."""
    results = []
    for count in sys.argv[1:]:
        command = [sys.executable, __file__, "measure", count]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        results.append(json.loads(done.stdout))
    print(json.dumps(results))


if __name__ == "__main__":
    if sys.argv[1] == "measure":
        print(json.dumps(measure(int(sys.argv[2]))), flush=True)
        os._exit(0)
    elif ":" in sys.argv[1]:
        simulate(sys.argv[1], range(int(sys.argv[2]), int(sys.argv[3])), int(sys.argv[4]))
    else:
        main()
