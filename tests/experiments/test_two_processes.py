"""All stages of experiments/train.py in two processes and in one."""

import importlib.util
import os
import subprocess
import sys

import pytest

from dit_video.training.hooks.logging import read_metrics
from support.devices import HANG, find_free_port, make_environment

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]


def test_two_processes_train_and_report_what_one_does(tiny_clips, tiny_run, tmp_path):
    port, run = find_free_port(), tmp_path / "run"
    command = [sys.executable, "experiments/train.py", "tests/support/tiny.py"]
    options = ["--data", str(tiny_clips), "--workdir", str(run), "--patience.max-silence", "300"]
    logged = importlib.util.find_spec("wandb") is not None
    options += ["--monitoring.wandb", "videos"] if logged else []
    processes = []
    try:
        for index in range(2):
            place = {"COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "NUM_PROCESSES": "2", "PROCESS_ID": str(index)}
            environment = {**make_environment(1), **place, "JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}"}
            environment["WANDB_MODE"] = "offline"
            output = (tmp_path / f"{index}.txt").open("w")
            processes.append(
                subprocess.Popen(
                    command + options,
                    env=environment,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    cwd=os.path.dirname(os.path.dirname(os.path.dirname(__file__))),
                )
            )
        codes = [process.wait(HANG) for process in processes]
    finally:
        for process in processes:
            process.kill()
    said = [(tmp_path / f"{index}.txt").read_text() for index in range(2)]
    assert codes == [0, 0], "\n".join(said)
    assert "report: " in said[0]
    assert "report: " not in said[1]
    assert len(list(run.glob("denoiser/wandb/offline-run-*"))) == logged  # the first process alone
    assert (run / "report.html").is_file()
    assert (run / "pipeline").is_dir()
    for stage in ("autoencoder", "denoiser"):
        alone, together = (read_metrics(folder / stage / "metrics.jsonl") for folder in (tiny_run, run))
        assert [entry["step"] for entry in together] == [entry["step"] for entry in alone]
        assert [entry["loss"] for entry in together] == pytest.approx([entry["loss"] for entry in alone], rel=1e-3)
