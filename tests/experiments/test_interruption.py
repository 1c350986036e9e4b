"""Scripts that are interrupted by Ctrl-C, and continued by the same command."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.quick_compilation import OPTIMIZED

ROOT = Path(__file__).resolve().parents[2]
TINY = "tests/support/tiny.py"


def newest(checkpoints):
    """Return the step of the newest checkpoint as another process sees it, or 0."""
    names = [path.name for path in checkpoints.iterdir()] if checkpoints.is_dir() else []
    return max((int(name) for name in names if name.isdigit()), default=0)


def interrupted(command, run, stage, *, step, environment):
    """Interrupt a command once a stage has a checkpoint of at least `step`; return its exit code and errors."""
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Commands that a shell starts in the background ignore Ctrl-C, and so do their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 900
        while newest(run / stage / "checkpoints") < step:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=300)
    finally:
        process.kill()
    assert "Traceback" not in err
    return process.returncode, err


def assert_saved(code, err):
    assert code == 0, err
    assert re.search(r"stopped: training the .*, by SIGINT after step \d+, which is saved; the same command", err)


@pytest.mark.slow
def test_a_real_ctrl_c_changes_nothing_of_the_result(tiny_clips, tmp_path):
    """A run that is interrupted in both trainings ends with the weights of one that is not."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def command(run):
        script = [sys.executable, str(ROOT / "experiments" / "train.py"), str(ROOT / TINY), "--data", str(tiny_clips)]
        longer = ["--autoencoder.steps", "120", "--denoiser.steps", "120", "--save-every", "20"]
        return [*script, "--workdir", str(run), *longer]

    for stage in ("autoencoder", "denoiser"):
        assert_saved(*interrupted(command(tmp_path / "one"), tmp_path / "one", stage, step=20, environment=environment))
        assert newest(tmp_path / "one" / stage / "checkpoints") < 120
        assert not (tmp_path / "one" / "pipeline").exists()
    for name in ("one", "two"):
        done = subprocess.run(
            command(tmp_path / name), env=environment, capture_output=True, text=True, timeout=900, check=False
        )
        assert done.returncode == 0, done.stderr
    for name in ("autoencoder.safetensors", "denoiser.safetensors"):
        one, two = (tmp_path / run / "pipeline" / name for run in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()


@pytest.mark.slow
def test_a_brief_quickstart_survives_ctrl_c(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **OPTIMIZED}
    command = [
        sys.executable,
        str(ROOT / "experiments" / "quickstart.py"),
        "--brief",
        "--workdir",
        str(tmp_path / "run"),
    ]
    # A short training saves its end alone, so the interruption is between the trainings or in the second one.
    code, err = interrupted(command, tmp_path / "run", "autoencoder", step=1, environment=environment)
    if code == 130:
        assert "interrupted: the same command continues with the remaining work" in err
    else:
        assert_saved(code, err)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    check = [sys.executable, str(ROOT / ".ci" / "check_run.py"), str(tmp_path / "run")]
    assert subprocess.run(check, env=environment, check=False).returncode == 0
