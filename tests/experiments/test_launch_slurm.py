"""slurm.sh requeues what a retry helps, with programs in place of SLURM's."""

import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from dit_video.core.errors import EXIT_TRY_AGAIN, UserError
from dit_video.distributed.faults.timeouts import TimeoutConfig
from dit_video.training.preemption import GRACE_VARIABLE, get_machine_grace

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "experiments" / "launch" / "slurm.sh"
TEXT = SCRIPT.read_text()
OPTIONS = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(\S*)$", TEXT, re.MULTILINE))


def test_the_times_fit_each_other():
    grace = get_machine_grace({GRACE_VARIABLE: re.findall(rf"{GRACE_VARIABLE}=(\d+)", TEXT)[0]})
    assert OPTIONS["signal"].startswith("TERM@")
    assert grace < int(OPTIONS["signal"].removeprefix("TERM@"))
    assert TimeoutConfig().max_silence < int(re.findall(r"--wait=(\d+)", TEXT)[0])


def test_the_processes_are_those_that_jax_expects():
    """JAX gives each process of a step the GPU of its local rank, among all GPUs of the node."""
    assert OPTIONS["ntasks-per-node"] == OPTIONS["gpus-per-node"]
    assert "gpus-per-task" not in OPTIONS
    assert {"requeue", "open-mode"} <= set(OPTIONS)


@pytest.fixture
def run_with_fakes(tmp_path) -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs slurm.sh with fake SLURM programs: exit code, srun's arguments, scontrol's."""

    def run(code: int, *arguments: str, scontrol_code: int = 0, **environment: str) -> tuple[int, str, str]:
        for name, program_code in (("srun", code), ("scontrol", scontrol_code)):
            program = tmp_path / name
            log = f'printf "[%s]" "$@" > "{tmp_path}/{name}.log"; env > "{tmp_path}/{name}.env"'
            program.write_text(f"#!/bin/bash\n{log}\nexit {program_code}\n")
            program.chmod(0o755)
        done = subprocess.run(
            ["bash", str(SCRIPT), *arguments],
            env={"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "3", **environment},
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
        )
        logs = [tmp_path / f"{name}.log" for name in ("srun", "scontrol")]
        srun, scontrol = (log.read_text() if log.exists() else "" for log in logs)
        return done.returncode, srun, scontrol

    return run


@pytest.mark.parametrize("code", [0, UserError.code])
def test_a_finished_run_and_a_user_error_are_final(code, run_with_fakes):
    assert run_with_fakes(code)[::2] == (code, "")


@pytest.mark.parametrize("code", [1, EXIT_TRY_AGAIN, 128 + signal.SIGKILL, 128 + signal.SIGSEGV, 128 + signal.SIGTERM])
def test_every_other_end_is_requeued(code, run_with_fakes):
    assert run_with_fakes(code)[::2] == (code, "[requeue][7]")


@pytest.mark.parametrize(
    ("environment", "is_requeued"),
    [
        ({"SLURM_RESTART_COUNT": "49"}, True),
        ({"SLURM_RESTART_COUNT": "50"}, False),
        ({"SLURM_RESTART_COUNT": "2", "MAX_RESTARTS": "3"}, True),
        ({"SLURM_RESTART_COUNT": "3", "MAX_RESTARTS": "3"}, False),
        ({"MAX_RESTARTS": "0"}, False),
    ],
)
def test_the_number_of_restarts_is_limited(environment, is_requeued, run_with_fakes):
    code, _, requeue = run_with_fakes(EXIT_TRY_AGAIN, **environment)
    assert (code, bool(requeue)) == (EXIT_TRY_AGAIN, is_requeued)


def test_the_exit_code_is_kept_if_slurm_does_not_requeue(run_with_fakes):
    assert run_with_fakes(137, scontrol_code=1)[0] == 137


def test_the_step_gets_its_cores_and_the_arguments_as_they_are(run_with_fakes, tmp_path):
    _, srun, _ = run_with_fakes(0, "config.py", "--data", "a b", https_proxy="proxy:1")
    command = ["--cpus-per-task=3", "--wait=120", "python", "-u", "experiments/train.py", "config.py", "--data", "a b"]
    options = ["--stopped-code", "75"]
    assert srun == "".join(f"[{word}]" for word in [*command, *options])
    environment = (tmp_path / "srun.env").read_text()
    assert "proxy" not in environment
    assert f"{GRACE_VARIABLE}=100" in environment
