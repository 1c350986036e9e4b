"""Imports point down the levels of the package, and heavy packages stay in their folders."""

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "dit_video"

LEVELS = (
    ("web", "apps", "curation", "planning", "scenes", "emoji"),
    ("loading",),
    ("experiment",),
    ("evaluation", "families"),
    ("sampling", "training"),
    ("data", "distributed"),
    ("weights",),
    ("models",),
    ("nn", "tokens", "diffusion", "video"),
    ("core",),
)
"""Folders of dit_video/, from the highest level to the lowest. Imports point downwards, and within a level to the
right. Those of the first level are satellites, which scripts use and nothing below does; `web` is the command of
`apps`, and `loading.py` opens whatever can be sampled."""

ORDER = [folder for level in LEVELS for folder in level]
ROOT_PACKAGE = "dit_video"
"""`dit_video/__init__.py` lies above everything: no module imports it, and it imports lazily."""

BACKBONES = ("controlled_dit.py", "dit.py", "ltx.py", "mmdit.py", "spatio_temporal.py", "unet.py", "vace.py", "wan.py")
"""Architectures in dit_video/models/backbones/."""
HEAVY = ("av", "flax", "grain", "jax", "orbax", "tensorflow_datasets", "transformers")
LIGHT_FOLDERS = ("models/backbones", "models/autoencoders", "models/encoders", "diffusion", "nn", "tokens")
LIGHT_MODULES = ("dit_video.training.step", "dit_video.training.state", "dit_video.sampling")


@functools.cache
def walk(source: str) -> list[ast.AST]:
    """Return the nodes of a source that name modules, classes or variables; every test reads all sources."""
    kinds = (ast.Import, ast.ImportFrom, ast.ClassDef, ast.Name)
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]


def imports(source: str, module: str, *, is_package: bool = False) -> Iterator[str]:
    """Yield the modules that `source` may import, also in functions: `from a import b` gives `a.b`."""
    here = module.split(".") if is_package else module.split(".")[:-1]
    for node in walk(source):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{name}.{alias.name}" for alias in node.names)


def get_folder(module: str) -> str:
    """Return the folder of a module: `data` for `dit_video.data.packing.plan`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ORDER else ROOT_PACKAGE


def violations(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """Return the imports of `module` that its level forbids."""
    folder = get_folder(module)
    if folder == ROOT_PACKAGE:
        return [] if module == ROOT_PACKAGE else [f"{module} lies in no folder of the table of levels"]
    forbidden = []
    for name in imports(source, module, is_package=is_package):
        if folder == "diffusion" and name.split(".")[0] == "flax":
            forbidden.append(f"{module} imports {name}: diffusion does not depend on Flax")
        if name.split(".")[0] != ROOT_PACKAGE:
            continue
        target = get_folder(name)
        if target == ROOT_PACKAGE:
            forbidden.append(f"{module} imports {name}: the package root, or no folder of the table")
        elif ORDER.index(target) < ORDER.index(folder):
            forbidden.append(f"{module} imports {name}: {target} lies above {folder}")
    return forbidden


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def check(path: Path) -> list[str]:
    source = path.read_text(encoding="utf-8")
    return violations(source, module_name(path), is_package=path.name == "__init__.py")


def test_imports_point_downwards():
    files = sources("dit_video")
    assert files
    assert [violation for path in files for violation in check(path)] == []


def test_only_backbones_and_families_name_one():
    """Everything else reaches a backbone or a family through its interface, so that one is added in its own place."""
    own = [PACKAGE / "models" / "backbones", PACKAGE / "families"]
    places = [own[0] / name for name in BACKBONES] + [path.parent for path in own[1].glob("*/__init__.py")]
    files = [path for place in places for path in (place.rglob("*.py") if place.is_dir() else [place])]
    nodes = [node for path in files for node in walk(path.read_text(encoding="utf-8"))]
    names = {node.name for node in nodes if isinstance(node, ast.ClassDef)}
    assert {"DiTConfig", "WanDit", "WanFamily"} <= names
    modules = tuple(f"{module_name(place.with_suffix('.py'))}." for place in places)
    used = []
    for path in sources("dit_video"):
        if any(path.is_relative_to(folder) for folder in own):
            continue
        source, module = path.read_text(encoding="utf-8"), module_name(path)
        used += [f"{module}: {name}" for name in imports(source, module) if f"{name}.".startswith(modules)]
        used += [f"{module}: {node.id}" for node in walk(source) if isinstance(node, ast.Name) and node.id in names]
    assert used == []


def test_no_modules_import_each_other_in_a_cycle():
    """The `__init__` of a package is left out, because it imports its own modules."""
    modules = {module_name(path): path for path in sources("dit_video") if path.name != "__init__.py"}
    edges = {
        module: {
            target
            for name in imports(path.read_text(encoding="utf-8"), module)
            for target in (name, name.rpartition(".")[0])
            if target in modules and target != module
        }
        for module, path in modules.items()
    }
    assert not cycle(edges), f"{cycle(edges)} import each other"


def cycle(edges: dict[str, set[str]]) -> set[str]:
    """Return the modules on or behind a cycle: those left when modules without open imports are removed."""
    left = {module: set(targets) for module, targets in edges.items()}
    while free := {module for module, targets in left.items() if not targets & left.keys()}:
        left = {module: targets for module, targets in left.items() if module not in free}
    return set(left)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("dit_video.models.backbones.dit", "from dit_video.training import step"),
        ("dit_video.models.backbones.dit", "from dit_video import training"),
        ("dit_video.models.backbones.dit", "import dit_video.weights.io"),
        ("dit_video.models.backbones.dit", "def build():\n    from dit_video.data import rows"),
        ("dit_video.models.backbones.dit", "from ...data import rows"),
        ("dit_video.models.backbones.dit", "from dit_video import load"),
        ("dit_video.models.backbones.dit", "import dit_video"),
        ("dit_video.core.rng", "from dit_video.nn import linear"),
        ("dit_video.video.clip", "from dit_video.data import clips as source"),
        ("dit_video.diffusion.objective", "from flax import nnx"),
        ("dit_video.diffusion.objective", "import flax.nnx as nnx"),
        ("dit_video.training.loop", "from dit_video.evaluation import psnr"),
        ("dit_video.training.loop", "from dit_video.sampling import Sampling"),
        ("dit_video.experiment.run", "from dit_video.scenes import render"),
        ("dit_video.curation.shots", "from dit_video.apps import reports"),
        ("dit_video.helpers", "import math"),
    ],
)
def test_a_violation_is_reported(module, source):
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("dit_video.data.clips", "from dit_video.video import decode"),
        ("dit_video.data.rows", "from dit_video.distributed import processes"),
        ("dit_video.models.autoencoders.objective", "from . import causal\nfrom .causal import Causal"),
        ("dit_video.nn.layers", "from dit_video.core.typing import AnyArray\nfrom flax import nnx"),
        ("dit_video.training.step", "from dit_video.core import rng; from dit_video import diffusion"),
        ("dit_video.experiment.run", "from dit_video.experiment import Experiment"),
        ("dit_video.apps.studio", "from dit_video.curation import export"),
        ("dit_video", "def load():\n    from dit_video.sampling.pipeline import load"),
    ],
)
def test_imports_of_lower_levels_are_allowed(module, source):
    assert violations(source, module) == []


def test_a_cycle_is_detected():
    assert cycle({"run": {"pipeline"}, "pipeline": {"experiment"}, "experiment": set()}) == set()
    assert cycle({"run": {"pipeline"}, "pipeline": {"run"}, "experiment": set()}) == {"run", "pipeline"}


def banned(path: Path, packages: set[str]) -> list[str]:
    names = imports(path.read_text(encoding="utf-8"), "script")
    return [f"{path.relative_to(ROOT)} imports {name}" for name in names if name.split(".")[0] in packages]


def test_the_package_uses_neither_torch_nor_pickle():
    unwanted = {"torch", "torchvision", "tensorflow", "pickle", "cloudpickle", "dill"}
    # These measure the models of other projects.
    peers = [ROOT / "tools" / "benchmarks" / name for name in ("peers.py", "wan_peer.py", "feature_networks.py")]
    files = [path for path in sources("dit_video", "experiments", "tools") if path not in peers]
    assert [line for path in files for line in banned(path, unwanted)] == []


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
    modules = [module_name(path) for folder in LIGHT_FOLDERS for path in sources(f"dit_video/{folder}")]
    lines = [f"import {module}" for module in [*modules, *LIGHT_MODULES]]
    python(without("av", "grain", "tensorflow_datasets", "tyro", "torch", "tensorflow") + "\n".join(lines))


def test_an_ingest_worker_imports_neither_jax_nor_tfds():
    python(without("jax", "flax", "tensorflow_datasets", "grain") + "import dit_video.data.ingest.worker")


def test_diffusion_imports_without_flax():
    modules = [module_name(path) for path in sources("dit_video/diffusion")]
    assert modules
    python(without("flax") + "\n".join(f"import {module}" for module in modules))
