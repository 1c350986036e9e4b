"""The health of a run, which process 0 finds by the heartbeats of all processes."""

import dataclasses
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from dit_video.core.errors import EXIT_TRY_AGAIN, UserError
from dit_video.distributed.faults.timeouts import TimeoutConfig

GRACE_SECONDS = 10.0
"""Seconds for the processes of a run to read a message and end by themselves."""
HEARTBEAT, TROUBLE, EXIT = "alive/", "trouble/", "left/"
"""Beginnings of the names of what each process writes: its heartbeat; an error that may come from another process; how
it ends. The number of the process follows."""


@dataclass(frozen=True, kw_only=True)
class Heartbeat:
    """The state of a process, which it writes at each interval."""

    beat: int
    """Number of the heartbeat."""
    step_count: int
    """Number of steps that it has finished."""
    changes: int = 0
    """Number of its signs of progress, of steps and other work."""
    phase: str = ""
    """Work in which it finishes no steps; empty if it declared none."""
    hang: str = ""
    """Description of what hangs in it; empty if nothing does."""

    def to_text(self) -> str:
        """Return the heartbeat as JSON."""
        return json.dumps(dataclasses.asdict(self))


@dataclass(frozen=True, kw_only=True)
class ProcessExit:
    """The end of a process, which it writes before."""

    error: str = ""
    """Error with which it ends; empty if it is done."""
    code: int = 0
    """Its exit code."""

    def to_text(self) -> str:
        """Return the end as JSON."""
        return json.dumps(dataclasses.asdict(self))


@dataclass(frozen=True, kw_only=True)
class RunHealth:
    """The state of all processes, which process 0 publishes at each interval."""

    beat: int = -1
    """Number of the interval; if it does not change, process 0 does not answer."""
    failure: str = ""
    """Description of what is wrong with a process, so that all end; empty if nothing is."""
    exit_code: int = EXIT_TRY_AGAIN
    """Exit code of all processes after the failure: if one has ended after a user's mistake, the code of such mistakes,
    so that nothing starts the run again."""
    is_hang: bool = False
    """True if the failure is a hang, after which each process shows its stacks."""
    changes: int = 0
    """Number of signs of progress of all processes."""
    is_busy: bool = False
    """True if a process is in a phase, for which the others may wait."""
    all_in_trouble: bool = False
    """True if all processes have met an error that may come from another process."""
    all_left: bool = False
    """True if all processes are done, or have ended with errors of their own."""

    def to_text(self) -> str:
        """Return the health as JSON."""
        return json.dumps(dataclasses.asdict(self))


class _Failure(NamedTuple):
    message: str = ""
    is_hang: bool = False
    exit_code: int = EXIT_TRY_AGAIN


class _ProcessState:
    """The newest heartbeat of a process, and the times of its last changes."""

    def __init__(self) -> None:
        self.heartbeat = Heartbeat(beat=-1, step_count=-1)
        self.restart()

    def restart(self) -> None:
        self.beat_time = self.step_time = time.monotonic()

    def update(self, heartbeat: Heartbeat) -> None:
        now = time.monotonic()
        if heartbeat.beat != self.heartbeat.beat:
            self.beat_time = now
        if heartbeat.step_count != self.heartbeat.step_count or heartbeat.phase:
            self.step_time = now
        self.heartbeat = heartbeat


class HealthChecker:
    """The checker of the heartbeats of a run's processes."""

    def __init__(self, names: list[str], timeouts: TimeoutConfig) -> None:
        """Initialize the checker.

        Args:
          names: Names of the processes for messages, in their order.
          timeouts: How long the processes are waited for.
        """
        self._names, self._timeouts = names, timeouts
        self._states = [_ProcessState() for _ in names]
        self._texts: Mapping[str, str] = {}
        self._exit_time: float | None = None
        """Time at which the first process was seen to have ended with an error."""

    def restart(self) -> None:
        """Forget the times of all changes, such as after a suspension of process 0."""
        for state in self._states:
            state.restart()

    def update(self, texts: Mapping[str, str]) -> None:
        """Take note of what the processes have written."""
        self._texts = texts
        for index, state in enumerate(self._states):
            if (text := texts.get(f"{HEARTBEAT}{index}")) is not None:
                state.update(Heartbeat(**json.loads(text)))

    def check(self, beat: int) -> RunHealth:
        """Return the health of the run at present."""
        exits = self._get_exits()
        count = len(self._names)
        failure = self._find_failure(exits, time.monotonic())
        return RunHealth(
            beat=beat,
            failure=failure.message,
            exit_code=failure.exit_code,
            is_hang=failure.is_hang,
            changes=sum(state.heartbeat.changes for state in self._states),
            is_busy=any(state.heartbeat.phase for index, state in enumerate(self._states) if index not in exits),
            all_in_trouble=sum(name.startswith(TROUBLE) for name in self._texts) == count,
            all_left=len(exits) == count,
        )

    def _get_exits(self) -> dict[int, ProcessExit]:
        names = (name for name in self._texts if name.startswith(EXIT))
        return {int(name.removeprefix(EXIT)): ProcessExit(**json.loads(self._texts[name])) for name in names}

    def _find_failure(self, exits: dict[int, ProcessExit], now: float) -> _Failure:
        """Return what is wrong with a process; an empty message if nothing is."""
        present = [index for index in range(len(self._names)) if index not in exits]
        failed = next((index for index in sorted(exits) if exits[index].error), None)
        if failed is not None and present:
            # The others may have the same error, and then report their own.
            self._exit_time = now if self._exit_time is None else self._exit_time
            if now - self._exit_time <= GRACE_SECONDS:
                return _Failure()
            code = exits[failed].code
            message = f"{self._names[failed]} has ended ({exits[failed].error})"
            return _Failure(message, exit_code=code if code == UserError.code else EXIT_TRY_AGAIN)
        for index in present:
            if hang := self._states[index].heartbeat.hang:
                is_alone = len({self._states[other].heartbeat.step_count for other in present}) > 1
                return _Failure(f"{self._names[index] if is_alone else 'each process'} hangs: {hang}", is_hang=True)
        max_silence, max_lag = self._timeouts.max_silence, self._timeouts.max_lag
        for index in present[1:] if 0 in present else present:
            if now - self._states[index].beat_time > max_silence:
                problem = f"has sent no heartbeat for {max_silence:g} s: dead, stopped, or cut off"
                return _Failure(f"{self._names[index]} {problem}")
        steps = {index: self._states[index].heartbeat.step_count for index in present}
        newest = max(steps.values(), default=0)
        for index, step_count in steps.items():
            if step_count < newest and now - self._states[index].step_time > max_lag:
                return _Failure(f"{self._names[index]} has been behind the others for {max_lag:g} s", is_hang=True)
        return _Failure()
