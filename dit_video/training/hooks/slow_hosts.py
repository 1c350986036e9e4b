"""Search for the process, or the device, that makes all others wait.

Processes of one training end each step at the same time. So each measures what it alone contributes: the time that its
host takes between steps, for data and everything else in Python, and the time of a small program on each of its
devices. It writes both into the run's `KeyValueStore` at entries of the log, at most as often as the budget allows; the
first process reads them, logs the median and the largest, and names a process that is slow for several readings in a
row.
"""

import contextlib
import functools
import itertools
import json
import socket
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dit_video.distributed.faults.store import KeyValueStore
from dit_video.training.goodput import SlowHost
from dit_video.training.hooks.hook import Hook
from dit_video.training.time_recorder import TimeRecorder

_SIDES = {"cpu": 192}
"""Sides of the matrices by platform."""
_DEFAULT_SIDE = 2048
_TARGET_SECONDS = 0.002
"""Time of the program on the first device, far above the time in which a program is started."""
_REPEATS = 3
_MAX_PRODUCTS = 10_000


@jax.jit
def _multiply(matrix: Float[Array, "n n"], count: Int[Array, ""] | int) -> Float[Array, "n n"]:
    # The mean keeps the values in range; the number of products is traced, so that there is one program.
    return jax.lax.fori_loop(0, count, lambda _, value: value @ matrix / matrix.shape[0], matrix)


class DeviceProbe:
    """A timed program for each device of this process."""

    def __init__(self) -> None:
        self._count = 0

    @functools.cached_property
    def _matrices(self) -> list[Float[Array, "n n"]]:
        devices = jax.local_devices()
        side = _SIDES.get(devices[0].platform, _DEFAULT_SIDE)
        dtype = jnp.float32 if devices[0].platform == "cpu" else jnp.bfloat16
        return [jax.device_put(jnp.ones((side, side), dtype), device) for device in devices]

    def prepare(self) -> None:
        """Compile the program, and choose its length by the first device."""
        if self._count:
            return
        for matrix in self._matrices:
            _multiply(matrix, 1).block_until_ready()
        trial = 4
        self._count = max(1, min(_MAX_PRODUCTS, round(trial * _TARGET_SECONDS / self._time(self._matrices[0], trial))))

    def measure(self) -> list[float]:
        """Return the microseconds of one product on each device, which should be idle: the least of a few runs."""
        self.prepare()
        seconds = [min(self._time(matrix, self._count) for _ in range(_REPEATS)) for matrix in self._matrices]
        return [1e6 * each / self._count for each in seconds]

    @staticmethod
    def _time(matrix: Float[Array, "n n"], count: int) -> float:
        start_time = time.perf_counter()
        _multiply(matrix, count).block_until_ready()
        return time.perf_counter() - start_time


_training_numbers = itertools.count()
"""Numbers of the trainings of this run, which all processes start in the same order."""


@dataclass(frozen=True, kw_only=True)
class SlowHostConfig:
    """Configuration of the search for slow processes."""

    ratio: float = 1.5
    """Time over the median from which a process, or a device, is slow."""
    readings: int = 5
    """Number of readings in a row for which it is, before it is named."""
    min_step_share: float = 0.5
    """Minimum share of a step's time that a host takes between steps to be named: below, its work is hidden behind that
    of the devices."""
    budget: float = 0.001
    """Maximum share of the time that measuring and exchanging take."""


class _Suspect(NamedTuple):
    process: int
    cause: str


class SlowHostMonitor(Hook):
    """Times of all processes in the log, and the names of those that are slow."""

    def __init__(
        self,
        recorder: TimeRecorder,
        *,
        config: SlowHostConfig | None = None,
        probe: DeviceProbe | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._recorder, self._config, self._clock = recorder, config or SlowHostConfig(), clock
        self._probe = DeviceProbe() if probe is None else probe
        self._store: KeyValueStore | None = None
        self._start_time, self._spent, self._last_spent = clock(), 0.0, 0.0
        self._counts: dict[_Suspect, int] = {}
        """Numbers of readings in a row for which each was slow."""
        self._read_steps: dict[int, int] = {}
        """Steps of the newest messages of the processes."""
        self._is_prepared = False
        self._step = 0

    def resume(self, step: int) -> None:
        """Start to count the time."""
        self._start_time, self._step = self._clock(), step
        if jax.process_count() > 1:
            self._store = KeyValueStore(f"speed/{next(_training_numbers)}")

    def on_step(self, step: int, state: Any, metrics: Mapping[str, Any]) -> None:
        self._step = step

    def derive(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return the median and the largest of the times of all processes, in the first of several.

        The first entry of a process, which has times of its start, is left out.
        """
        if self._store is None and jax.local_device_count() == 1:
            return {}  # nothing to compare with
        if not self._is_prepared:
            self._probe.prepare()
            self._is_prepared = True
            return {}
        start_time = self._clock()
        if "host_seconds" not in values or self._spent + self._last_spent > self._config.budget * (
            start_time - self._start_time
        ):
            return {}
        own = {
            "step": self._step,
            "name": socket.gethostname(),
            "host": values["host_seconds"],
            "devices": self._probe.measure(),
        }
        try:
            results = self._compare(self._exchange(own), values["step_seconds"])
        finally:
            self._last_spent = self._clock() - start_time
            self._spent += self._last_spent
        return results

    def _exchange(self, own: dict[str, Any]) -> dict[int, dict[str, Any]]:
        """Return the newest messages of all processes in the first one, and only its own in another process."""
        if self._store is None:
            return {0: own}
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the first process is gone: the heartbeat says why
            self._store.write(str(jax.process_index()), json.dumps(own))
            if jax.process_index() == 0:
                return {int(name): json.loads(text) for name, text in self._store.read().items()}
        return {}

    def _compare(self, messages: Mapping[int, Mapping[str, Any]], step_seconds: float) -> dict[str, float]:
        if len(messages) < jax.process_count():
            return {}  # some have not measured yet
        fresh = {index for index, each in messages.items() if each["step"] != self._read_steps.get(index)}
        self._read_steps = {index: each["step"] for index, each in messages.items()}
        hosts = {_Suspect(index, "data"): each["host"] for index, each in messages.items()}
        devices = {
            _Suspect(index, f"device {number}"): seconds
            for index, each in messages.items()
            for number, seconds in enumerate(each["devices"])
        }
        for times, minimum in ((hosts, self._config.min_step_share * step_seconds), (devices, 0.0)):
            # The median of two is the smaller one.
            limit = max(minimum, self._config.ratio * statistics.median_low(times.values()))
            for suspect, seconds in times.items():
                if suspect.process in fresh:
                    ratio = seconds / max(statistics.median_low(times.values()), 1e-9)
                    self._judge(suspect, messages[suspect.process]["name"], ratio, is_slow=seconds > limit)
        results = {"probe_microseconds_median": statistics.median(devices.values())}
        results["probe_microseconds_max"] = max(devices.values())
        if len(hosts) > 1:
            slowest = max(hosts, key=lambda suspect: hosts[suspect])
            results["host_seconds_median"] = statistics.median(hosts.values())
            results |= {"host_seconds_max": hosts[slowest], "slowest_process": float(slowest.process)}
        return results

    def _judge(self, suspect: _Suspect, host: str, ratio: float, *, is_slow: bool) -> None:
        """Count the readings for which a process is slow, and name it once."""
        if not is_slow:
            if self._counts.pop(suspect, 0) >= self._config.readings:
                print(f"process {suspect.process} ({host}) is as fast as the others again", file=sys.stderr)
            return
        self._counts[suspect] = self._counts.get(suspect, 0) + 1
        if self._counts[suspect] != self._config.readings:
            return
        slow = SlowHost(process=suspect.process, host=host, cause=suspect.cause, ratio=round(ratio, 2), step=self._step)
        self._recorder.note_slow_host(slow)
        if suspect.cause == "data":
            problem = f"takes {ratio:.1f} times as long between steps, for data and in Python, as the median process"
        else:
            problem = f"is slow: its {suspect.cause} takes {ratio:.1f} times as long as the median device"
        print(f"process {suspect.process} ({host}) {problem}; all others wait for it", file=sys.stderr)
