"""Imports go down the levels of the house, heavy packages stay in their rooms, and files stay short."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "dit_video"

LEVELS = {
    4: {
        "animation",
        "pipeline",
        "pipeline_config",
        "class_pipeline",
        "wan_pipeline",
        "loading",
        "experiment",
        "intake",
        "encoding",
        "codec",
        "inspection",
        "live",
        "feed",
        "run",
        "run_folder",
        "starting",
        "stages",
        "watching",
        "results",
        "finetuning",
        "distilling",
        "text_encoder",
        "image_encoder",
        "given_frames",
        "measure",
        "reports",
        "planning",
        "web",
    },
    3: {"training", "generation", "evaluation"},
    2: {"distributed", "weights"},
    1: {"video", "data", "autoencoder", "text", "dit", "features", "conditioning", "diffusion"},
    0: {"nn", "tokens"},
}
"""The rooms of each level. The single files of level 0 lie under all of them, `nn` and `tokens` too."""
GROUND = {
    "arrays",
    "pixels",
    "rng",
    "tree",
    "errors",
    "files",
    "configs",
    "compiled",
    "code_version",
    "xla_flags",
    "huge_pages",
}
SIDEWAYS = {("data", "video"), ("autoencoder", "features")}
COMPOSITION = 4
"""The level that composes: its files may import each other, as long as they do not do so in a circle."""

HEIGHT = {room: level for level, rooms in LEVELS.items() for room in rooms} | dict.fromkeys(GROUND, -1)
FRONT_DOOR = "dit_video"
"""`dit_video/__init__.py` lies above everything: nobody imports it, and it imports what it likes, lazily."""

HEAVY = ("av", "flax", "grain", "jax", "orbax", "tensorflow_datasets", "transformers")
LIGHT_ROOMS = ("dit", "diffusion", "nn", "tokens", "text", "autoencoder")
LIGHT_MODULES = ("dit_video.training.step", "dit_video.training.state")
LONGEST = 450


def imported(source: str, module: str, *, is_package: bool = False) -> Iterator[str]:
    """Absolute names of all modules that `source` may import, also inside functions: `from a import b` gives `a.b`."""
    here = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{name}.{alias.name}" for alias in node.names)


def room_of(module: str) -> str:
    """`dit_video.data.packing.plan` lies in `data`; what is no known room is the front door."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in HEIGHT else FRONT_DOOR


def violations(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """What `module` imports that its level forbids."""
    room = room_of(module)
    if room == FRONT_DOOR:
        return [] if module == FRONT_DOOR else [f"{module} is not in the table of levels"]
    found = []
    for name in imported(source, module, is_package=is_package):
        if room == "diffusion" and name.split(".")[0] == "flax":
            found.append(f"{module} imports {name}: diffusion knows nothing of Flax")
        if name.split(".")[0] != FRONT_DOOR:
            continue
        target = room_of(name)
        if target == FRONT_DOOR:
            found.append(f"{module} imports {name}: that is the front door, or no room of the table")
        elif target != room and not allowed(room, target):
            found.append(f"{module} (level {HEIGHT[room]}) imports {name} (level {HEIGHT[target]})")
    return found


def allowed(room: str, target: str) -> bool:
    if HEIGHT[room] == HEIGHT[target]:
        return (room, target) in SIDEWAYS or HEIGHT[room] in (-1, COMPOSITION)
    return HEIGHT[room] > HEIGHT[target]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def check(path: Path) -> list[str]:
    source = path.read_text(encoding="utf-8")
    return violations(source, module_name(path), is_package=path.name == "__init__.py")


def test_imports_go_down():
    files = sources("dit_video")
    assert files
    assert [violation for path in files for violation in check(path)] == []


def test_the_composing_level_has_no_circle():
    edges: dict[str, set[str]] = {}
    for path in sources("dit_video"):
        room = room_of(module_name(path))
        if HEIGHT.get(room) == COMPOSITION:
            names = imported(path.read_text(encoding="utf-8"), module_name(path), is_package=path.name == "__init__.py")
            targets = {room_of(name) for name in names if name.split(".")[0] == FRONT_DOOR}
            edges.setdefault(room, set()).update(t for t in targets - {room} if HEIGHT.get(t) == COMPOSITION)
    assert not circle(edges), f"{circle(edges)} import each other"


def circle(edges: dict[str, set[str]]) -> set[str]:
    """The rooms that lie on or behind a circle: what is left when rooms without open imports are taken away."""
    left = {room: set(targets) for room, targets in edges.items()}
    while free := {room for room, targets in left.items() if not targets & left.keys()}:
        left = {room: targets for room, targets in left.items() if room not in free}
    return set(left)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("dit_video.backbones.dit.model", "from dit_video.training import step"),
        ("dit_video.backbones.dit.model", "from dit_video import training"),
        ("dit_video.backbones.dit.model", "import dit_video.autoencoders.vae"),
        ("dit_video.backbones.dit.model", "def build():\n    from dit_video.text import encoder"),
        ("dit_video.backbones.dit.model", "from ..text import encoder"),
        ("dit_video.backbones.dit.model", "from dit_video import load"),
        ("dit_video.backbones.dit.model", "import dit_video"),
        ("dit_video.nn.linear", "from dit_video.tokens import Grid"),
        ("dit_video.core.rng", "from dit_video.nn import linear"),
        ("dit_video.video.clip", "from dit_video.data import clips as source"),
        ("dit_video.diffusion.objective", "from flax import nnx"),
        ("dit_video.diffusion.objective", "import flax.nnx as nnx"),
        ("dit_video.training.loop", "from dit_video.evaluation import psnr"),
        ("dit_video.helpers", "import math"),
    ],
)
def test_a_violation_is_found(module, source):
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("dit_video.data.clips", "from dit_video.video import decode"),
        ("dit_video.autoencoders.losses", "from dit_video.features import lpips"),
        ("dit_video.autoencoders.losses", "from . import causal\nfrom .causal import Causal"),
        ("dit_video.nn.linear", "from dit_video.core.typing import AnyArray\nfrom flax import nnx"),
        ("dit_video.core.files", "from dit_video.core.errors import UserError"),
        ("dit_video.training.step", "from dit_video.core import rng; from dit_video import diffusion"),
        ("dit_video.experiment.run", "from dit_video.experiment import Experiment"),
        ("dit_video", "def load():\n    from dit_video.pipelines.pipeline import load"),
    ],
)
def test_the_way_down_is_open(module, source):
    assert violations(source, module) == []


def test_a_circle_is_found():
    assert circle({"run": {"pipeline"}, "pipeline": {"experiment"}, "experiment": set()}) == set()
    assert circle({"run": {"pipeline"}, "pipeline": {"run"}, "experiment": set()}) == {"run", "pipeline"}


def banned(path: Path, packages: set[str]) -> list[str]:
    names = imported(path.read_text(encoding="utf-8"), "script")
    return [f"{path.relative_to(ROOT)} imports {name}" for name in names if name.split(".")[0] in packages]


def test_neither_torch_nor_pickle():
    unwanted = {"torch", "torchvision", "tensorflow", "pickle", "cloudpickle", "dill"}
    # Which time other projects' models, where they are installed.
    peers = [ROOT / "tools" / "benchmarks" / name for name in ("peers.py", "wan_peer.py")]
    files = [path for path in sources("dit_video", "experiments", "tools") if path not in peers]
    assert [line for path in files for line in banned(path, unwanted)] == []


def test_files_are_short():
    files = sources("dit_video", "experiments", "tools", "tests")
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert {name: length for name, length in lengths.items() if length > LONGEST} == {}


def python(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def without(*packages: str) -> str:
    return f"import sys; sys.modules.update(dict.fromkeys({packages!r}))\n"


def test_the_package_imports_nothing_heavy():
    python(
        "import sys, dit_video\n"
        f"loaded = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "assert not loaded, f'import dit_video loads {loaded}'"
    )


def test_models_and_the_step_import_without_video_and_data():
    modules = [module_name(path) for room in LIGHT_ROOMS for path in sources(f"dit_video/{room}")]
    assert {room_of(module) for module in modules} == set(LIGHT_ROOMS)
    lines = [f"import {module}" for module in [*modules, *LIGHT_MODULES]]
    python(without("av", "grain", "tensorflow_datasets", "tyro", "torch", "tensorflow") + "\n".join(lines))


def test_diffusion_imports_without_flax():
    modules = [module_name(path) for path in sources("dit_video/diffusion")]
    assert modules
    python(without("flax") + "\n".join(f"import {module}" for module in modules))
