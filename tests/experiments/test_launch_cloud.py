"""The files for XPK, SkyPilot and TPU VMs, as these tools read them where they are installed.

XPK and SkyPilot need environments of their own: `XPK_BIN` and `SKYPILOT_PYTHON` name the program and the Python there.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from dit_video.core.errors import EXIT_TRY_AGAIN, UserError
from dit_video.training.preemption import get_machine_grace

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "experiments" / "launch"
TRAINING = ("experiments/configs/clips.py", "--data", "gs://BUCKET/my clips", "--workdir", "/runs/clips")


# XPK


@pytest.fixture(scope="module")
def xpk_manifest(tmp_path_factory):
    """Return the JobSet that XPK makes of xpk.sh, in a dry run."""
    xpk = os.environ.get("XPK_BIN") or shutil.which("xpk")
    if xpk is None:
        pytest.skip("needs XPK (pip install xpk in an environment of its own; XPK_BIN=PROGRAM)")
    manifest = tmp_path_factory.mktemp("xpk") / "manifest.yaml"
    options = "--dry-run --skip-validation --project=project --zone=us-central1-a"
    variables = {"XPK": f"{options} --output-manifest-file={manifest}", "SLICES": "2", "STORAGE": ""}
    variables["PATH"] = f"{Path(xpk).parent}:{os.environ['PATH']}"
    command = ["bash", str(LAUNCH / "xpk.sh"), "cluster", "IMAGE", *TRAINING]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return yaml.safe_load(manifest.read_text())


@pytest.mark.slow
def test_xpk_makes_a_jobset_with_our_exit_codes_and_times(xpk_manifest):
    (replicated,) = xpk_manifest["spec"]["replicatedJobs"]
    assert replicated["replicas"] == 2
    assert xpk_manifest["spec"]["failurePolicy"]["maxRestarts"] == 50
    job = replicated["template"]["spec"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["operator"]) == ("FailJob", "NotIn")
    assert {EXIT_TRY_AGAIN, 137, 139, 143} <= set(rule["onExitCodes"]["values"])
    assert UserError.code not in rule["onExitCodes"]["values"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    environment = {variable["name"]: variable["value"] for variable in container["env"]}
    assert get_machine_grace(environment) < pod["terminationGracePeriodSeconds"]


@pytest.mark.slow
def test_a_signal_reaches_the_training_through_xpks_shell(xpk_manifest, tmp_path):
    (replicated,) = xpk_manifest["spec"]["replicatedJobs"]
    (container,) = replicated["template"]["spec"]["template"]["spec"]["containers"]
    shell, option, text = container["command"]
    python = tmp_path / "python"
    program = """import json, pathlib, signal, sys, time
folder = pathlib.Path(__file__).parent
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
(folder / "started.part").write_text(json.dumps(sys.argv[1:]))
(folder / "started.part").rename(folder / "started")
time.sleep(60)
"""
    python.write_text(f"#!{sys.executable} -S\n{program}")
    python.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    process = subprocess.Popen([shell, option, text.replace("cd /dit_video", f"cd {ROOT}")], env=environment)
    deadline = time.monotonic() + 60
    while not (tmp_path / "started").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == EXIT_TRY_AGAIN
    arguments = json.loads((tmp_path / "started").read_text())
    assert arguments[2 : 2 + len(TRAINING)] == list(TRAINING)


# SkyPilot


def test_a_skypilot_job_is_recovered_as_other_files_restart():
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    recovery = task["resources"]["job_recovery"]
    assert {EXIT_TRY_AGAIN, 134, 137} <= set(recovery["recover_on_exit_codes"])
    assert UserError.code not in recovery["recover_on_exit_codes"]
    assert recovery["max_restarts_on_errors"] == 0  # counts exit codes that are not in the list
    (volume,) = task["volumes"]
    assert f"--workdir {volume}/" in task["run"]
    assert get_machine_grace(task["envs"]) < 30
    gpus = task["num_nodes"] * int(task["resources"]["accelerators"].rpartition(":")[2])
    assert f"--mesh.fsdp {gpus} " in task["run"]


@pytest.mark.slow
def test_skypilot_reads_the_task(tmp_path):
    if not (python := os.environ.get("SKYPILOT_PYTHON")):
        pytest.skip("needs SkyPilot (pip install skypilot in an environment of its own; SKYPILOT_PYTHON=PYTHON)")
    program = """import json, sys, sky
task = sky.Task.from_yaml(sys.argv[1])
(resources,) = task.resources
print(json.dumps([task.num_nodes, resources.accelerators, resources.use_spot, resources.job_recovery, task.volumes]))
"""

    def read(path: Path) -> subprocess.CompletedProcess:
        command = [python, "-c", program, str(path)]
        environment = os.environ | {"HOME": str(tmp_path)}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT)

    done = read(LAUNCH / "skypilot.yaml")
    assert done.returncode == 0, done.stderr
    nodes, accelerators, use_spot, recovery, volumes = json.loads(done.stdout.splitlines()[-1])
    assert (nodes, accelerators, use_spot, volumes) == (2, {"H100": 8}, True, {"/runs": "RUNS"})
    assert recovery["recover_on_exit_codes"][0] == EXIT_TRY_AGAIN
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text((LAUNCH / "skypilot.yaml").read_text().replace("num_nodes: 2", "nodes: 2"))
    assert read(wrong).returncode != 0


# TPU VMs


def run_tpu_vm(folder: Path, states: str, **environment: str) -> tuple[subprocess.CompletedProcess, list[list[str]]]:
    """Run tpu_vm.sh with a gcloud that answers with a state after another; return its calls."""
    (folder / "states").write_text(states)
    program = f"""#!{sys.executable} -S
import json, pathlib, sys
folder = pathlib.Path({str(folder)!r})
with (folder / "calls").open("a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
if "describe" in sys.argv:
    first, _, rest = (folder / "states").read_text().partition(" ")
    (folder / "states").write_text(rest or first)
    if first == "NONE":
        sys.exit(1)
    print(first)
"""
    (folder / "gcloud").write_text(program)
    (folder / "gcloud").chmod(0o755)
    variables = {"PATH": f"{folder}:/usr/bin:/bin", "POLL_SECONDS": "0.01"} | environment
    command = ["bash", str(LAUNCH / "tpu_vm.sh"), "name", "us-central1-a", *TRAINING]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    calls = [json.loads(line) for line in (folder / "calls").read_text().splitlines()]
    return done, [call for call in calls if "describe" not in call]


@pytest.mark.parametrize(
    ("states", "verbs"),
    [
        ("ACTIVE", ["ssh", "ssh"]),
        ("NONE NONE WAITING_FOR_RESOURCES PROVISIONING ACTIVE", ["create", "ssh", "ssh"]),
        ("SUSPENDED NONE CREATING ACTIVE", ["delete", "create", "ssh", "ssh"]),
        ("FAILED NONE ACTIVE", ["delete", "create", "ssh", "ssh"]),
    ],
)
def test_slices_are_made_where_there_are_none(states, verbs, tmp_path):
    done, calls = run_tpu_vm(tmp_path, states, SETUP="git clone REPOSITORY")
    assert done.returncode == 0, done.stderr
    assert [call[3] for call in calls] == verbs
    assert "--command=git clone REPOSITORY" in calls[-2]
    # All hosts at once: each waits for the others.
    assert {"--node=all", "--worker=all", "--batch-size=all"} <= set(calls[-1])


@pytest.mark.slow
@pytest.mark.parametrize("slices", ["1", "4"])
def test_gcloud_takes_the_arguments(slices, tmp_path):
    """Without an account gcloud ends with exit code 1 after it has read its arguments, and with 2 before."""
    if (gcloud := shutil.which("gcloud")) is None:
        pytest.skip("needs gcloud")
    folder = tmp_path / "fake"
    folder.mkdir()
    _, calls = run_tpu_vm(folder, "SUSPENDED NONE ACTIVE", SLICES=slices)
    configuration = {"CLOUDSDK_CONFIG": str(tmp_path), "CLOUDSDK_CORE_PROJECT": "project"}
    environment = os.environ | configuration | {"CLOUDSDK_CORE_DISABLE_PROMPTS": "1"}
    for call in [*calls, [*calls[-1], "--no-such-option"]]:
        done = subprocess.run(
            [gcloud, *call], env=environment, capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == (2 if "--no-such-option" in call else 1), done.stderr
        assert ("unrecognized arguments" in done.stderr) == ("--no-such-option" in call)
