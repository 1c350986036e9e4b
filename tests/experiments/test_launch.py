"""The launch files are read as the shell, Kubernetes and the script itself would read them."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from dit_video.core.errors import EXIT_TRY_AGAIN
from dit_video.distributed.processes import _VARIABLES

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "experiments" / "launch"
SHELL = sorted(path.name for path in LAUNCH.glob("*.sh"))


@pytest.mark.parametrize("name", SHELL)
def test_every_shell_script_is_valid_bash_and_starts_the_same_training(name):
    path = LAUNCH / name
    assert path.stat().st_mode & 0o111
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    text = path.read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail" in text
    (started,) = [line for line in text.splitlines() if "python -u" in line and not line.startswith("#")]
    assert "experiments/train.py" in started


def test_the_tests_cover_every_launch_file():
    assert {path.name for path in LAUNCH.iterdir()} == {*SHELL, "jobset.yaml"}


def test_a_script_without_arguments_prints_its_usage():
    for name in ("processes.sh", "tpu_vm.sh"):
        done = subprocess.run(["bash", str(LAUNCH / name)], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert done.stderr.startswith("usage:")


def test_every_process_gets_its_index_and_the_coordinator(tmp_path):
    """A fake Python prints its arguments, and the one of the last process fails."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$COORDINATOR_ADDRESS $NUM_PROCESSES $PROCESS_ID $*"\nexit "$PROCESS_ID"\n')
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", str(LAUNCH / "processes.sh"), "3", "config.py", "--data", "a b"],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
    )
    assert done.returncode == 1
    expected = [f"127.0.0.1:12355 3 {index} -u experiments/train.py config.py --data a b" for index in range(3)]
    assert sorted(done.stdout.splitlines()) == expected


def test_a_slurm_job_is_signalled_before_its_end_and_requeued():
    text = (LAUNCH / "slurm.sh").read_text()
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(\S*)$", text, re.MULTILINE))
    assert options["signal"].startswith("TERM@")
    assert "requeue" in options
    assert options["ntasks-per-node"] == options["gpus-per-node"]  # JAX gives each process of a step one device
    assert f'"$code" -eq {EXIT_TRY_AGAIN}' in text
    assert f"--stopped-code {EXIT_TRY_AGAIN}" in text


def test_the_jobset_fits_its_slice_and_the_exit_codes():
    document = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    assert (document["apiVersion"], document["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (job,) = document["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"][-1] == "experiments/train.py"
    assert (ROOT / container["args"][0]).is_file()
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert spec["parallelism"] == spec["completions"]
    assert spec["parallelism"] * container["resources"]["limits"]["google.com/tpu"] == rows * columns
    assert f"--mesh.fsdp={rows * columns}" in container["args"]
    assert spec["completionMode"] == "Indexed"
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [2]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert f"--stopped-code={EXIT_TRY_AGAIN}" in container["args"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_the_launch_files_set_the_variables_that_the_package_reads():
    for name in ("processes.sh", "jobset.yaml"):
        text = (LAUNCH / name).read_text()
        assert all(variable in text for variable in _VARIABLES)
    commented = (LAUNCH / "jobset.yaml").read_text().split("#   env:\n")[1].replace("#     ", "")
    variables = yaml.safe_load(commented)
    assert {variable["name"] for variable in variables} == set(_VARIABLES)
    assert shlex.split(variables[-1]["value"])[0].startswith("dit-video-slice-0-0.dit-video:")
