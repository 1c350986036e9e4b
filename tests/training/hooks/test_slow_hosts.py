"""A process or a device that makes all others wait is named; one that is as fast as they are is not."""

import json
import socket

import jax
import pytest

from dit_video.training.goodput import read_attempts
from dit_video.training.hooks import slow_hosts
from dit_video.training.hooks.logging import read_metrics
from dit_video.training.hooks.slow_hosts import DeviceProbe, SlowHostConfig, SlowHostMonitor
from dit_video.training.time_recorder import TimeRecorder
from support.devices import check_on_eight_devices, run_together


class SetProbe(DeviceProbe):
    """A probe whose times a test sets."""

    def __init__(self, *times):
        super().__init__()
        self.times = list(times)
        self.count = 0

    def prepare(self):
        """Compile nothing."""

    def measure(self):
        self.count += 1
        return self.times


class SetStore:
    """A store in which a test writes the messages of the other processes."""

    def __init__(self, texts):
        self.texts = texts

    def write(self, name, text):
        self.texts[name] = text

    def read(self):
        return dict(self.texts)


class Cluster:
    """The first of four processes; a test sets the times of the others."""

    def __init__(self, monkeypatch, tmp_path, **config):
        self.stores: list[dict[str, str]] = []
        """Texts of the namespaces, in the order in which they were opened."""
        namespaces: dict[str, dict[str, str]] = {}

        def open_store(namespace):
            self.stores.append(namespaces.setdefault(namespace, {}))
            return SetStore(self.stores[-1])

        monkeypatch.setattr(jax, "process_count", lambda: 4)
        monkeypatch.setattr(slow_hosts, "KeyValueStore", open_store)
        self.recorder, self.probe, self.now = TimeRecorder(tmp_path), SetProbe(10.0), 0.0
        options = {"budget": 1.0, **config}
        self.monitor = SlowHostMonitor(
            self.recorder, config=SlowHostConfig(**options), probe=self.probe, clock=lambda: self.now
        )
        self.step = 0
        self.monitor.resume(0)
        self.log()

    def log(self, hosts=(0.01, 0.01, 0.01), devices=(10.0, 10.0, 10.0), *, own=0.01, step_seconds=0.05, silent=()):
        """Log an entry after others have written theirs, and return its values."""
        self.step += 10
        self.now += 1
        for index, (host, device) in enumerate(zip(hosts, devices, strict=True), start=1):
            if index not in silent:
                message = {"step": self.step, "name": f"node{index}", "host": host, "devices": [10.0, device]}
                self.stores[-1][str(index)] = json.dumps(message)
        self.monitor.on_step(self.step, None, {})
        return self.monitor.derive({"host_seconds": own, "step_seconds": step_seconds})


@pytest.fixture
def cluster(monkeypatch, tmp_path):
    cluster = Cluster(monkeypatch, tmp_path)
    with cluster.recorder.attempt():
        yield cluster


def read_slow_hosts(cluster, tmp_path):
    cluster.recorder.flush()
    return read_attempts(tmp_path)[0].slow_hosts


def test_entries_have_the_median_and_the_largest(cluster):
    values = cluster.log((0.01, 0.03, 0.02), (11.0, 12.0, 30.0), own=0.02)
    assert values == {
        "host_seconds_median": 0.02,
        "host_seconds_max": 0.03,
        "slowest_process": 2.0,
        "probe_microseconds_median": 10.0,
        "probe_microseconds_max": 30.0,
    }


def test_a_host_that_is_slow_in_several_readings_is_named_once(cluster, tmp_path, capsys):
    for _ in range(4):
        cluster.log((0.01, 0.04, 0.01))
    assert capsys.readouterr().err == ""
    for _ in range(4):
        cluster.log((0.01, 0.04, 0.01))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("process 2 (node2) takes 4.0 times as long between steps")
    (slow,) = read_slow_hosts(cluster, tmp_path)
    assert (slow.process, slow.host, slow.cause, slow.ratio, slow.step) == (2, "node2", "data", 4.0, cluster.step - 30)
    cluster.log()
    assert capsys.readouterr().err == "process 2 (node2) is as fast as the others again\n"


def test_a_throttled_device_is_named(cluster, tmp_path, capsys):
    for _ in range(5):
        cluster.log(devices=(10.0, 10.0, 19.0))
    assert "process 3 (node3) is slow: its device 1 takes 1.9 times as long" in capsys.readouterr().err
    assert [slow.cause for slow in read_slow_hosts(cluster, tmp_path)] == ["device 1"]


def test_what_is_short_hidden_or_below_the_ratio_is_not_named(cluster, capsys):
    for number in range(40):
        slow = 0.04 if number % 5 else 0.01  # for four readings in a row
        cluster.log((0.01, slow, 0.01), (10.0, 10.0, 10.0 if number % 3 else 30.0))
        cluster.log((0.001, 0.02, 0.001), own=0.001)  # hidden behind a step of 50 ms
        cluster.log((0.014, 0.04, 0.05), (14.0, 14.9, 10.0), own=0.04)
    assert capsys.readouterr().err == ""


def test_a_message_counts_once(cluster, capsys):
    """A process that logs rarely, or hangs, is not slow because its last message is read again."""
    cluster.log((0.01, 0.04, 0.01))
    for _ in range(10):
        cluster.log(silent=(2,))
    assert capsys.readouterr().err == ""


def test_a_training_has_no_times_of_the_one_before_it(cluster):
    cluster.log((0.01, 0.04, 0.01))
    next_monitor = SlowHostMonitor(cluster.recorder, probe=cluster.probe, config=SlowHostConfig(budget=1.0))
    next_monitor.resume(0)
    values = {"host_seconds": 0.01, "step_seconds": 0.05}
    assert [next_monitor.derive(values) for _ in range(2)] == [{}, {}]  # the others have not measured in this one yet


def test_measuring_keeps_to_its_budget(monkeypatch, tmp_path):
    cluster = Cluster(monkeypatch, tmp_path, budget=0.001)

    def measure():
        cluster.now += 0.003
        cluster.probe.count += 1
        return [10.0]

    cluster.probe.measure = measure
    for _ in range(200):
        cluster.log()
    # A second for each entry: a measurement of 3 ms every three seconds.
    assert 60 <= cluster.probe.count <= 67


def test_a_store_that_is_gone_ends_no_training(cluster, monkeypatch):
    def fail(*_arguments):
        raise error

    monkeypatch.setattr(SetStore, "write", fail)
    error = jax.errors.JaxRuntimeError("UNAVAILABLE: failed to connect to all addresses")
    assert cluster.log() == {}
    error = KeyError("a mistake of the code")
    with pytest.raises(KeyError):
        cluster.log()


def test_a_process_of_one_device_has_nothing_to_compare_with():
    probe = SetProbe(1.0)
    monitor = SlowHostMonitor(TimeRecorder(), probe=probe)
    monitor.resume(0)
    for _ in range(3):
        assert monitor.derive({"host_seconds": 1.0, "step_seconds": 1.0}) == {}
    assert probe.count == 0


def test_the_probe_measures_devices_alike():
    probe = DeviceProbe()
    first, second = probe.measure(), probe.measure()
    assert len(first) == jax.local_device_count()
    assert first == pytest.approx(second, rel=3)
    assert 0 < first[0] < 1e6


@pytest.mark.slow
def test_devices_of_one_process_are_compared():
    check_on_eight_devices("slow_device_of_eight.py")


@pytest.mark.slow
@pytest.mark.parametrize("slow", ["nothing", "data", "device"])
def test_two_real_processes_of_which_one_is_slow(tmp_path, slow):
    outputs = run_together("slow_host_in_two_processes.py", str(tmp_path), slow)
    (attempt,) = read_attempts(tmp_path / "goodput")
    # Other tests on this machine may slow the other process down.
    named = [(each.host, each.cause) for each in attempt.slow_hosts if each.process == 1]
    cause = {"nothing": [], "data": ["data"], "device": ["device 0"]}[slow]
    assert named == [(socket.gethostname(), each) for each in cause]
    assert outputs[0].count(f"process 1 ({socket.gethostname()})") == len(cause)
    assert "process 1 (" not in outputs[1]  # the first process says it
    entries = read_metrics(tmp_path / "metrics.jsonl")
    last = entries[-1]
    if slow == "data":
        assert last["slowest_process"] == 1
        assert last["host_seconds_max"] > 2 * last["host_seconds"]  # its own
        assert last["host_seconds_max"] == pytest.approx(last["step_seconds"], rel=0.5)
    if slow == "device":
        assert last["probe_microseconds_max"] > 1.2 * last["probe_microseconds_median"]
