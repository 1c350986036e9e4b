"""Heartbeats of simulated processes on a real coordination service; `test_processes.py` has real processes."""

import json
import subprocess
import sys
import threading
import time

import pytest

from dit_video.core.errors import TransientError, UserError
from dit_video.distributed.faults.heartbeat import HeartbeatMonitor
from dit_video.distributed.faults.timeouts import TimeoutConfig
from support.coordination import run_in_all, simulate_processes
from support.devices import HANG, PROGRAMS, make_environment

LIMITS = TimeoutConfig(max_silence=600.0)


def measure_traffic(count, seconds=2.5):
    """Return the most calls of a process but the first, and the texts of all per process, for a run of some seconds."""

    def live(group):
        with HeartbeatMonitor(LIMITS, group):
            time.sleep(seconds)

    with simulate_processes(count) as groups:
        run_in_all(live, groups)
        calls = [sum(group.client.calls.values()) for group in groups]
        return max(calls[1:]), sum(group.client.num_texts for group in groups) / count


@pytest.mark.slow
def test_the_traffic_of_heartbeats_is_linear_in_the_number_of_processes():
    """Only process 0 reads the heartbeats of all; the calls of another process do not depend on their number."""
    results = []
    threads = [threading.Thread(target=lambda count=count: results.append(measure_traffic(count))) for count in (8, 32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(results)
    for calls, texts in results:
        assert calls < 40
        assert texts < 40  # With 32 processes that read all heartbeats each second there would be more than a hundred.


def test_processes_with_different_settings_are_refused_by_name():
    def compare(group):
        try:
            with HeartbeatMonitor(LIMITS, group) as monitor:
                monitor.compare({"config": {"steps": 5 + (group.process_id == 2)}})
        except UserError as error:
            return str(error)
        return ""

    with simulate_processes(3) as groups:
        (message,) = set(run_in_all(compare, groups))
    assert "process 2 (" in message
    assert "config.steps is 6 there and 5 here" in message


def test_a_process_that_does_not_start_is_named():
    with simulate_processes(3) as groups:

        def start(group):
            with pytest.raises(TransientError, match=r"within 1 s: .*\. Start all processes again"):
                HeartbeatMonitor(TimeoutConfig(startup=1.0), group).__enter__()

        run_in_all(start, groups[:2])


@pytest.mark.nightly
def test_the_load_of_the_first_process_is_linear_up_to_300_processes():
    """Each process has its own connection to the service of process 0, whose CPU time is measured."""
    command = [sys.executable, str(PROGRAMS / "coordinator_load.py"), "100", "300"]
    done = subprocess.run(command, env=make_environment(1), capture_output=True, text=True, check=False, timeout=HANG)
    assert done.returncode == 0, done.stderr
    few, many = json.loads(done.stdout)
    print(few, many)
    for prefix in ("", "waiting_"):
        assert many[f"{prefix}calls"] / 300 < 1.2 * few[f"{prefix}calls"] / 100
        assert many[f"{prefix}cpu"] / 300 < 1.5 * few[f"{prefix}cpu"] / 100
    assert many["waiting_cpu"] < 0.5
