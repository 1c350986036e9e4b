"""ray_job.py on a Ray cluster of this machine, of two nodes, and its manifest."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dit_video.core.errors import EXIT_TRY_AGAIN, UserError
from dit_video.training.hooks.logging import read_metrics
from support.devices import HANG, make_environment

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "experiments" / "launch"


def start_cluster(tries: int = 4) -> Any:
    """Return a cluster of two nodes, each of which Ray gives 30 seconds to start, too few on a busy machine."""
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=2)
    except Exception:
        cluster.shutdown()
        if tries == 1:
            raise
        return start_cluster(tries - 1)
    return cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Return the address of a Ray cluster of two nodes."""
    pytest.importorskip("ray", reason="needs ray (pip install 'ray[default]')")
    cluster = start_cluster()
    yield cluster.address
    cluster.shutdown()


@pytest.fixture
def start(cluster) -> Iterator[Callable[..., subprocess.Popen]]:
    """Return a function that starts ray_job.py on the two nodes."""
    started = []

    def start(*arguments: object, **environment: str) -> subprocess.Popen:
        command = [sys.executable, str(LAUNCH / "ray_job.py"), "--nodes", "2", "--cpus", "2", *map(str, arguments)]
        variables = make_environment(1) | {"RAY_ADDRESS": cluster, "PYTHONPATH": f"{ROOT}:{ROOT}/tests"} | environment
        process = subprocess.Popen(
            command, env=variables, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()


def end(process: subprocess.Popen) -> tuple[int, str]:
    output, _ = process.communicate(timeout=HANG)
    return process.returncode, output


PROGRAM = """import os, pathlib, signal, sys, time
folder, kind = pathlib.Path(sys.argv[1]), sys.argv[2]
index = os.environ["PROCESS_ID"]
count = len(list(folder.glob(f"{index}-*")))
(folder / f"{index}-{count}").write_text(os.environ["COORDINATOR_ADDRESS"] + " " + os.environ["NUM_PROCESSES"])
def stop(*_):
    (folder / f"saved-{index}").touch()
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
if kind == "wait":
    time.sleep(600)
if index == "1" and kind == "killed" and count == 0:
    os.kill(os.getpid(), signal.SIGKILL)
if index == "1" and kind == "wrong":
    sys.exit(2)
sys.exit(75 if kind != "good" and (kind != "killed" or count == 0) else 0)
"""


@pytest.fixture
def program(tmp_path) -> Path:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "code", "starts"),
    [("good", 0, 1), ("killed", 0, 2), ("wrong", UserError.code, 1), ("again", EXIT_TRY_AGAIN, 3)],
)
def test_processes_are_started_again_unless_a_retry_is_no_help(kind, code, starts, program, tmp_path, start):
    process = start("--max-restarts", "2", "--script", program, "--", tmp_path, kind)
    ended, output = end(process)
    assert ended == code, output
    for index in range(2):
        assert len(list(tmp_path.glob(f"{index}-*"))) == starts
    addresses = {path.read_text() for path in tmp_path.glob("?-0")}
    assert len(addresses) == 1
    assert addresses.pop().endswith(" 2")


@pytest.mark.slow
def test_a_signal_lets_all_processes_save(program, tmp_path, start):
    process = start("--script", program, "--", tmp_path, "wait")
    deadline = time.monotonic() + HANG
    while len(list(tmp_path.glob("?-0"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    time.sleep(1)  # until the handlers are there
    process.send_signal(signal.SIGTERM)
    code, output = end(process)
    assert code == EXIT_TRY_AGAIN, output
    assert len(list(tmp_path.glob("saved-*"))) == 2


@pytest.mark.slow
def test_a_training_on_ray_continues_after_a_killed_process(tiny_clips, tmp_path, start):
    run = tmp_path / "run"
    training = ["tests/support/tiny.py", "--data", tiny_clips, "--workdir", run, "--denoiser.steps", "200"]
    process = start("--", *training, "--save-every", "10")
    metrics = run / "denoiser" / "metrics.jsonl"
    deadline = time.monotonic() + HANG
    while not (metrics.exists() and any(entry["step"] > 20 for entry in read_metrics(metrics))):
        assert process.poll() is None, end(process)[1]
        assert time.monotonic() < deadline
        time.sleep(0.2)
    victim = find_process(str(run), "PROCESS_ID=1")
    os.kill(victim, signal.SIGKILL)
    code, output = end(process)
    assert code == 0, output
    assert "after 0 restarts" in output
    assert "2 processes, found by the environment" in output
    steps = [entry["step"] for entry in read_metrics(metrics)]
    assert steps == sorted(set(steps))
    assert steps[-1] == 200
    assert (run / "report.html").is_file()


def find_process(argument: str, variable: str) -> int:
    """Return the id of the training's process with an argument and an environment variable."""
    numbers = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().decode().split("\0")
            environment = (process / "environ").read_bytes().decode().split("\0")
        except (OSError, UnicodeDecodeError):
            continue
        if argument in command and variable in environment and "experiments/train.py" in command[:4]:
            numbers.append(int(process.name))
    (number,) = numbers
    return number
