import math
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from dit_video.core.errors import UserError
from dit_video.distributed.faults.store import KeyValueStore
from dit_video.training.checkpoint import Checkpoints
from dit_video.training.loop import LoopConfig, run
from dit_video.training.preemption import SharedStopRequest, get_machine_grace, raise_on_sigterm
from support.coordination import run_in_all, simulate_processes
from support.devices import HANG, PROGRAMS, find_free_port, make_environment
from support.loop_training import get_state_shapes, init_state, make_batches, plain_step


def take_steps(stop, *, start=0, limit=2000, seconds=0.01):
    """Take steps until the processes stop, and return their number."""
    for step in range(start + 1, limit + 1):
        if stop.should_stop():
            return step - 1
        time.sleep(seconds)
        stop.record_step(step)
    return limit


def stop_together(groups, *, signalled=1, failures=0, late=0.0):
    """Let simulated processes train until one gets a signal; return their last steps, and which know of the signal."""
    informed = [threading.Event() for _ in groups]

    def train(group):
        store = KeyValueStore("stop", group)
        stop = SharedStopRequest(0, on_request=informed[group.process_id].set, store=store)
        if group.process_id == signalled:
            threading.Timer(0.3, lambda: setattr(stop, "signal_name", "SIGTERM")).start()
            group.client.num_failures = failures
        step = take_steps(stop, seconds=0.01 + late * (group.process_id == 0))
        stop.acknowledge()
        stop.close()
        return step, stop.signal_name

    return run_in_all(train, groups), informed


def test_all_processes_stop_after_the_same_step():
    with simulate_processes(8) as groups:
        results, informed = stop_together(groups)
    (step,) = {step for step, _ in results}
    assert 5 < step < 2000
    assert [name for _, name in results] == ["SIGTERM in process 1", "SIGTERM", *["SIGTERM in process 1"] * 6]
    assert all(event.is_set() for event in informed)  # So each starts its timer, not only the one with the signal.


@pytest.mark.nightly
def test_they_stop_together_though_calls_fail():
    """More calls in a row fail than one call is repeated."""
    with simulate_processes(3) as groups:
        results, _ = stop_together(groups, failures=7)
    (step,) = {step for step, _ in results}
    assert step < 2000


def test_no_process_takes_a_further_step_while_they_agree():
    """The first process learns of the signal two seconds late; the other waits, and then takes the steps it has to."""
    with simulate_processes(2) as groups:
        first, second = (KeyValueStore("stop", group) for group in groups)
        stop = SharedStopRequest(0, store=second)
        stop.signal_name = "SIGTERM"
        options = {"combine": lambda steps: max(steps, key=int)}
        meeting = threading.Timer(2.0, first.meet, ["last_step", "150"], options)
        meeting.start()
        start_time = time.monotonic()
        assert take_steps(stop) == 150
        assert time.monotonic() - start_time > 3  # of which 150 steps take half
        stop.close()
        meeting.join()


def test_traffic_of_the_agreement_is_linear_in_the_number_of_processes():
    texts = []
    for count in (5, 20):
        with simulate_processes(count) as groups:
            stop_together(groups)
            texts.append(sum(group.client.num_texts for group in groups) / count)
    assert max(texts) < 60


def test_the_machine_says_how_long_it_waits():
    assert get_machine_grace({}) == math.inf
    assert get_machine_grace({"DIT_VIDEO_PREEMPTION_GRACE": "110"}) == 110.0
    for text in ("soon", "0", "-5", "nan"):
        with pytest.raises(UserError, match=f"DIT_VIDEO_PREEMPTION_GRACE={text} .* Use DIT_VIDEO_PREEMPTION_GRACE=100"):
            get_machine_grace({"DIT_VIDEO_PREEMPTION_GRACE": text})


def test_an_invalid_time_of_the_machine_is_refused_at_the_start_of_a_run(monkeypatch):
    monkeypatch.setenv("DIT_VIDEO_PREEMPTION_GRACE", "soon")
    with pytest.raises(UserError, match="DIT_VIDEO_PREEMPTION_GRACE=soon is invalid"), raise_on_sigterm():
        pass


@pytest.mark.nightly
def test_a_shorter_time_of_the_machine_ends_a_process_that_hangs():
    command = [sys.executable, str(PROGRAMS / "slow_to_stop.py")]
    environment = make_environment(1) | {"DIT_VIDEO_PREEMPTION_GRACE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=HANG)
    assert done.returncode == 75, done.stderr
    assert "error: the state was not saved within 1 s after SIGTERM" in done.stderr
    assert "in sleep_after_signal" in done.stderr


def start_group(folder, steps):
    """Start two processes of a training in a process group of their own, which their data workers are in, too."""
    port, processes = find_free_port(), []
    for index in range(2):
        place = {"COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "NUM_PROCESSES": "2", "PROCESS_ID": str(index)}
        place["JAX_COORDINATOR_BIND_ADDRESS"] = f"127.0.0.1:{port}"
        process = subprocess.Popen(
            [sys.executable, str(PROGRAMS / "signalled_training.py"), str(folder), str(steps)],
            env=make_environment(1) | place,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=processes[0].pid if processes else 0,
        )
        processes.append(process)
    return processes


@pytest.mark.slow
def test_a_signal_to_all_processes_and_their_workers_stops_them_at_one_saved_step(tmp_path):
    """SLURM and terminals send signals to all processes of a job. The training resumes with the next batch."""
    processes = start_group(tmp_path / "stopped", 10**5)
    try:
        for process in processes:
            assert process.stdout is not None
            while process.stdout.readline() != "step 10\n":
                assert process.poll() is None
        os.killpg(processes[0].pid, signal.SIGTERM)
        errors = [process.communicate(timeout=HANG)[1] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], errors
    finally:
        for process in processes:
            process.kill()
    step = Checkpoints(tmp_path / "stopped" / "checkpoints").latest()
    assert step is not None
    assert all(f"training, by SIGTERM after step {step}, which is saved" in error for error in errors), errors
    ended = [process.communicate(timeout=HANG) for process in start_group(tmp_path / "stopped", step + 20)]
    assert all("finished" in out for out, _ in ended), ended
    resumed = Checkpoints(tmp_path / "stopped" / "checkpoints").restore(get_state_shapes())[0].params
    whole = run(plain_step, init_state(), make_batches, config=LoopConfig(steps=step + 20)).params
    for name in ("w", "b"):
        np.testing.assert_array_equal(resumed[name], whole[name])
