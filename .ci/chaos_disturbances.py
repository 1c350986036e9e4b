"""The disturbances of `chaos_harness.py`: what is done to a training, and how it is known that it was hit.

Each function applies one to a cluster whose training is under way, and returns once the fault is over, or once all
processes have ended. The event then has `hit` if the fault had the effect that its kind promises.
"""

import random
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from chaos_cluster import KILLED, SILENCE, Cluster, is_stopped, send_signal

from support.fake_gcs import FakeGcs

STOPPED = 75
"""Exit code of processes that want to be started again."""
MISTAKE = 2
"""Exit code of processes that want a person to act first."""
MAX_STARTS = 5
"""Number of starts after which the training has not recovered."""
MAX_HANG_SECONDS = 180.0
"""Seconds in which a process that hangs has to be noticed."""
PROCESS_COUNTS = (2, 3, 4)
"""Numbers of processes of a training that is resized."""


@dataclass(kw_only=True)
class Event:
    """A disturbance, and what came of it."""

    kind: str
    training: str
    processes: int
    """Number of processes that were disturbed."""
    step: int
    """Newest step that was logged before the training went on."""
    begin: float = 0.0
    """Time of day of the fault's begin, in seconds."""
    detail: str = ""
    hit: bool = False
    """Whether the fault had its effect."""
    codes: list[list[int]] = field(default_factory=list)
    """Exit codes of the processes, for each time that they have ended."""
    hung: int = 0
    """Number of processes that had to be killed as they did not end by themselves."""
    recovered: bool = False
    """Whether a later step than `step` was logged after the fault."""
    seconds: float = 0.0
    """Time from the fault's begin to that step."""


class Chaos:
    """What disturbs a training at random."""

    def __init__(self, cluster: Cluster, bucket: FakeGcs, chosen: random.Random):
        self.cluster, self.bucket, self.chosen = cluster, bucket, chosen

    def kill(self, event: Event) -> None:
        """Kill a process; in half of the cases its disk is lost, too."""
        victim = self._choose_victim(event)
        self._kill(event, victim)
        if self.chosen.random() < 0.5:
            event.detail += ", whose disk is lost"
            self.cluster.lose_disk(victim)

    def kill_starting(self, event: Event) -> None:
        """Stop all processes, and kill one at a moment of the next start."""
        self._preempt(event, self.cluster.processes)
        self.cluster.start()
        seconds = self.chosen.uniform(1.0, 0.9 * self.cluster.start_seconds)
        self.cluster.wait_for(lambda: self._goes_on(event), seconds)
        victim = self._choose_victim(event)
        event.begin = time.time()
        event.detail += f", {event.begin - self.cluster.start_time:.0f} s after its start"
        send_signal(self.cluster.processes[victim], signal.SIGKILL)
        self._note_end(event)
        is_new = self.cluster.find_first_step(beyond=event.step, since=self.cluster.start_time) is None
        event.hit &= event.codes[-1][victim] == KILLED and is_new

    def freeze(self, event: Event) -> None:
        """Stop a process for longer than its silence is tolerated; in half of the cases it goes on later."""
        victim = self._choose_victim(event)
        process = self.cluster.processes[victim]
        send_signal(process, signal.SIGSTOP)
        if self.chosen.random() < 0.5:
            self._note_end(event, frozen=process)
        else:
            event.detail += ", which goes on later"
            others = [each for each in self.cluster.processes if each is not process]
            deadline = time.monotonic() + 6 * SILENCE
            while any(each.poll() is None for each in others) and time.monotonic() < deadline:
                time.sleep(0.1)
            send_signal(process, signal.SIGCONT)
            self._note_end(event)
        codes = event.codes[-1]
        event.hit = all(code not in (0, KILLED) for index, code in enumerate(codes) if index != victim)

    def hang(self, event: Event) -> None:
        """Let a process hang, while its heartbeats go on."""
        self.cluster.processes[self._choose_victim(event)].send_signal(signal.SIGUSR1)
        self.cluster.wait_for(lambda: False, MAX_HANG_SECONDS)
        event.hit = any(" hangs: " in output for output in self.cluster.read_outputs())
        self._note_end(event)

    def pause(self, event: Event) -> None:
        """Stop a process for a time that is tolerated: the same processes go on."""
        process = self.cluster.processes[self._choose_victim(event)]
        start = time.time()
        send_signal(process, signal.SIGSTOP)
        time.sleep(0.4 * SILENCE)
        newest = max((entry.time for entry in self.cluster.read_log()), default=0.0)
        event.hit = is_stopped(process) and newest < start + 0.2 * SILENCE  # none can take steps without it
        event.step = self.cluster.get_newest_step()
        send_signal(process, signal.SIGCONT)

    def suspend(self, event: Event) -> None:
        """Suspend all processes for a long time, as a scheduler may: JAX ends them when they go on."""
        for process in self.cluster.processes:
            send_signal(process, signal.SIGSTOP)
        time.sleep(2 * SILENCE)
        for process in self.cluster.processes:
            send_signal(process, signal.SIGCONT)
        self._note_end(event)
        event.hit = all(code not in (0, KILLED) for code in event.codes[-1])

    def preempt(self, event: Event) -> None:
        """Send SIGTERM to one process or to all, which save and end."""
        if self.chosen.random() < 0.5:
            event.detail = "all"
            self._preempt(event, self.cluster.processes)
        else:
            self._preempt(event, [self.cluster.processes[self._choose_victim(event)]])

    def damage(self, event: Event) -> None:
        """Kill a process, and change, cut or remove a file of the newest checkpoint before the next start."""
        self._kill(event, self._choose_victim(event))
        prefix = f"{self.cluster.address.removeprefix('gs://bucket/')}/checkpoints/denoiser/"
        parts = [name.removeprefix(prefix).split("/") for name in self.bucket.list_names(prefix)]
        steps = sorted(int(part[0]) for part in parts if part[1:] == ["commit_success.txt"])
        names = ["/".join(part) for part in parts if steps and part[0] == str(steps[-1]) and "d" in part[1:-1]]
        if len(steps) < 2 or not names:
            event.hit = False
            return
        name, way = self.chosen.choice(names), self.chosen.choice(("changed", "cut", "removed"))
        stored = self.bucket.objects[prefix + name]
        middle = len(stored.content) // 2
        if way == "removed":
            del self.bucket.objects[prefix + name]
        elif way == "cut":
            stored.content = stored.content[:middle]
        else:
            changed = bytes([stored.content[middle] ^ 255])
            stored.content = stored.content[:middle] + changed + stored.content[middle + 1 :]
        event.detail += f"; {name} is {way}"
        event.hit &= self._restart_and_find(event, f"checkpoint {steps[-1]} in ")

    def outage(self, event: Event) -> None:
        """Let the bucket answer no request for a while."""
        seconds = self.chosen.choice((3.0, 10.0, 40.0))
        event.detail = f"{seconds:g} s"
        self._fail(event, lambda *_: 503, seconds)

    def flaky(self, event: Event) -> None:
        """Kill a process, and let three of ten requests fail until the training goes on."""
        self._kill(event, self._choose_victim(event))
        failures = self.bucket.failure_count
        self.bucket.fail_at_random(0.3, seed=self.chosen.randrange(2**32))
        for _ in range(MAX_STARTS):
            self.cluster.start()
            if self.cluster.wait_for(lambda: self._goes_on(event)):
                break
            self._note_end(event)
        self.bucket.fail = lambda *_: 0
        event.hit &= self.bucket.failure_count >= failures + 10

    def slow(self, event: Event) -> None:
        """Let every answer of the bucket come a second later for a while."""
        count = len(self.bucket.requests)
        self.bucket.delay = 1.0
        self.cluster.wait_for(lambda: len(self.bucket.requests) >= count + 20, 60.0)
        event.hit = len(self.bucket.requests) >= count + 20
        self.bucket.delay = 0.0
        event.detail = f"{len(self.bucket.requests) - count} requests"
        event.step = self.cluster.get_newest_step()

    def deny(self, event: Event) -> None:
        """Deny all writes until the processes have ended for a person to act."""
        failures = self.bucket.failure_count
        self.bucket.fail = lambda method, _: 403 if method in ("POST", "PUT") else 0
        self.cluster.wait_for(lambda: False, 120.0)
        self._note_end(event)
        self.bucket.fail = lambda *_: 0
        event.hit = self.bucket.failure_count > failures and MISTAKE in event.codes[-1]

    def remove(self, event: Event) -> None:
        """Kill a process, lose its disk, and go on with fewer."""
        self.kill(event)
        self.cluster.count = self.chosen.choice([count for count in PROCESS_COUNTS if count < event.processes])
        event.detail += f"; now {self.cluster.count} processes"

    def add(self, event: Event) -> None:
        """Stop all processes, and go on with more."""
        self._preempt(event, self.cluster.processes)
        self.cluster.count = self.chosen.choice([count for count in PROCESS_COUNTS if count > event.processes])
        event.detail = f"now {self.cluster.count} processes"

    def _choose_victim(self, event: Event) -> int:
        victim = self.chosen.randrange(len(self.cluster.processes))
        event.detail += f"process {victim}"
        return victim

    def _kill(self, event: Event, victim: int) -> None:
        send_signal(self.cluster.processes[victim], signal.SIGKILL)
        self._note_end(event)
        event.hit = event.codes[-1][victim] == KILLED

    def _preempt(self, event: Event, processes: list[subprocess.Popen]) -> None:
        for process in processes:
            send_signal(process, signal.SIGTERM)
        self._note_end(event)
        event.hit = all(code == STOPPED for code in event.codes[-1])

    def _fail(self, event: Event, fail: Callable[[str, str], int], seconds: float) -> None:
        """Let requests fail for a time from the first one on."""
        failures = self.bucket.failure_count
        self.bucket.fail = fail
        self.cluster.wait_for(lambda: self.bucket.failure_count > failures, 60.0)
        event.hit = self.bucket.failure_count > failures
        time.sleep(seconds)
        self.bucket.fail = lambda *_: 0
        event.step = self.cluster.get_newest_step()

    def _note_end(self, event: Event, *, frozen: subprocess.Popen | None = None) -> None:
        """Wait until all processes have ended, and note how, and how far they came."""
        codes, hung = self.cluster.wait_for_end(frozen=frozen)
        event.codes.append(codes)
        event.hung += hung
        event.step = max(event.step, self.cluster.get_newest_step())

    def _goes_on(self, event: Event) -> bool:
        return self.cluster.find_first_step(beyond=event.step, since=self.cluster.start_time) is not None

    def _restart_and_find(self, event: Event, text: str) -> bool:
        """Start the training, and return whether a process prints something before the training goes on."""

        def is_printed() -> bool:
            return any(text in output for output in self.cluster.read_outputs())

        self.cluster.start()
        self.cluster.wait_for(lambda: is_printed() or self._goes_on(event))
        return is_printed()
