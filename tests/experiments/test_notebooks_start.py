"""The first cell of the notebooks, which installs the repository on Colab and Kaggle."""

import json
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "experiments" / "notebooks").glob("*.ipynb"))


def read_start(path):
    """Return the first cell of code of a notebook."""
    return json.loads(path.read_text(encoding="utf-8"))["cells"][1]


START = "".join(read_start(NOTEBOOKS[0])["source"])
CLONE = ["git", "clone", "--depth=1", "REPOSITORY", "dit_video"]
GPU, TPU, OTHER_TPU = "/dev/nvidia0", "/dev/accel0", "/dev/vfio/0"


class Machine:
    """A machine with or without an installed package, on which no command runs: `commands` records them."""

    def __init__(self, monkeypatch, folder):
        self.commands, self.devices, self.is_installed, self.is_reachable = [], [], False, True
        self.versions = {"jax": "1", "jaxlib": "1", "numpy": "1"}
        self.new_versions = self.versions
        self.home = folder
        monkeypatch.chdir(folder)
        monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
        monkeypatch.delitem(sys.modules, "google.colab", raising=False)
        monkeypatch.setattr("subprocess.run", self.run_command)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if self.is_installed else None)
        monkeypatch.setattr("importlib.metadata.version", lambda name: self.versions[name])
        monkeypatch.setattr("glob.glob", lambda pattern: [path for path in self.devices if Path(path).match(pattern)])

    def run_command(self, command, **_options):
        self.commands.append(command)
        if command == CLONE and self.is_reachable:
            self.make_checkout(Path.cwd() / "dit_video")
        if "pip" in command:
            self.is_installed, self.versions = True, self.new_versions
        return SimpleNamespace(returncode=0 if self.is_reachable else 128)

    @staticmethod
    def make_checkout(folder):
        notebooks = folder / "experiments" / "notebooks"
        notebooks.mkdir(parents=True)
        (notebooks / "spiral.ipynb").touch()

    def start(self):
        """Run the cell."""
        exec(START, {})

    @property
    def folder(self):
        """Return the current folder, relative to that in which the session began."""
        return Path.cwd().relative_to(self.home)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Return a machine of one's own."""
    return Machine(monkeypatch, tmp_path)


@pytest.fixture(params=["colab", "kaggle"])
def hosted(request, machine, monkeypatch):
    """Return a machine of Colab or Kaggle."""
    if request.param == "colab":
        monkeypatch.setitem(sys.modules, "google.colab", ModuleType("google.colab"))
    else:
        monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    return machine


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_all_notebooks_begin_with_the_same_cell(path):
    cell = read_start(path)
    assert (cell["id"], cell["cell_type"]) == ("start", "code")
    assert "".join(cell["source"]) == START


def test_the_placeholder_of_the_address_is_that_of_the_readme():
    assert "git clone REPOSITORY dit_video" in (ROOT / "README.md").read_text()
    assert START.count('"REPOSITORY"') == 1


@pytest.mark.parametrize(
    ("devices", "extra"),
    [([], ""), ([GPU], "[gpu]"), ([TPU], "[tpu]"), ([OTHER_TPU], "[tpu]"), ([GPU, OTHER_TPU], "[gpu]")],
)
def test_a_hosted_session_clones_and_installs_what_its_devices_need(hosted, devices, extra):
    hosted.devices = devices
    hosted.start()
    pip = [sys.executable, "-m", "pip", "install", "--quiet", f"../..{extra}"]
    assert hosted.commands == [CLONE, pip]
    assert hosted.folder == Path("dit_video/experiments/notebooks")


def test_running_the_cell_again_does_nothing(hosted):
    hosted.start()
    folder, count = hosted.folder, len(hosted.commands)
    hosted.start()
    assert (hosted.folder, len(hosted.commands)) == (folder, count)


def test_a_restarted_session_only_goes_to_the_notebooks(hosted):
    hosted.start()
    os.chdir(hosted.home)
    hosted.commands.clear()
    hosted.start()
    assert hosted.commands == []
    assert hosted.folder == Path("dit_video/experiments/notebooks")


def test_packages_in_use_that_were_updated_ask_for_a_restart(hosted):
    hosted.new_versions = hosted.versions | {"numpy": "2"}
    with pytest.raises(RuntimeError, match="restart the session"):
        hosted.start()
    os.chdir(hosted.home)
    hosted.start()  # after the restart


def test_an_address_that_cannot_be_cloned_is_reported_with_what_to_do(hosted):
    hosted.is_reachable = False
    with pytest.raises(OSError, match=r"clone REPOSITORY: set REPOSITORY .* Internet on"):
        hosted.start()
    assert hosted.commands == [CLONE]


def test_an_installed_checkout_is_left_alone(machine):
    machine.is_installed = True
    machine.start()
    assert machine.commands == []
    assert machine.folder == Path()


def test_nothing_is_installed_on_a_machine_of_ones_own(machine):
    with pytest.raises(ModuleNotFoundError, match=r"pip install -e '\.\[notebook\]'"):
        machine.start()
    assert machine.commands == []
