"""Fixtures: a tiny run, trained once a session, and scripts run the way users run them."""

import atexit
import fcntl
import functools
import gc
import importlib
import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import jax
import pytest

import support.lazy_checks  # noqa: F401 (checks functions of dit_video: see pyproject.toml)
from support.compilations import count_compilations
from support.devices import HANG
from support.fake_gcs import FakeGcs, serve
from support.quick_compilation import set_quick_flags, share_contexts

ROOT = Path(__file__).resolve().parents[1]


def pytest_make_parametrize_id(config, val, argname):
    """Name whole files by their argument: encoders write other bytes each time, and processes must agree on names."""
    return argname if isinstance(val, bytes) and len(val) > 64 else None


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Compile a large program once a session, also for scripts and workers of pytest-xdist.

    Small programs are compiled again: to write one to the cache takes as long as to compile it.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # as in a worker
        # In the folder of pytest, which removes those of older sessions, however they ended.
        folder = config._tmp_path_factory.mktemp("compiled")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "1.0"
    # JAX has already read its environment.
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update(
        "jax_persistent_cache_min_compile_time_secs",
        float(os.environ.get("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", 1.0)),
    )
    _compile_quickly(True)  # for computations while tests are collected
    set_quick_flags()
    share_contexts()


_LONG_FILES = (
    "tests/experiments/test_two_processes.py",
    "tests/experiments/test_amended_run.py",
    "tests/experiments/test_interruption.py",
    "tests/distributed/test_context_parallel.py",
    "tests/distributed/test_processes.py",
    "tests/tools/test_gpu_benchmark.py",
    "tests/tools/test_plan.py",
    "tests/experiment/test_replay.py",
    "tests/experiments/test_notebooks.py",
    "tests/test_docs.py",
    "tests/test_extending.py",
    "tests/experiments/test_finetune.py",
    "tests/experiments/test_distill.py",
    "tests/experiment/self_check/test_faults.py",
    "tests/planning/test_pipeline.py",
)
"""Files with which a session begins, if it keeps this order (`--no-loadscope-reorder`): they have the slowest tests,
and at the end one process would run them while the others have nothing left."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first."""
    ranks = {ROOT / name: rank for rank, name in enumerate(_LONG_FILES)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


def pytest_collection_finish() -> None:
    """Exclude what lives to the end of the session, such as modules and tests, from garbage collection.

    The others are searched less often: traces of JAX are many objects that live, and the search takes 4 % of the time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Compile programs without most optimisations: with tiny models, compilation takes most of the time."""
    if item.get_closest_marker("wrong_types") and item.config.getoption("jaxtyping_packages"):
        pytest.skip("the checks of types refuse its arguments before it does")
    _compile_quickly("optimized_compilation" not in getattr(item, "fixturenames", ()))


def _compile_quickly(quick: bool) -> None:
    """Choose the kind of compilation in this process and in those that it starts."""
    jax.config.update("jax_disable_most_optimizations", quick)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(int(quick))


def _load_file(path: Path) -> ModuleType:
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def load_file() -> Callable[[Path], ModuleType]:
    """Return a function that imports a Python file outside of packages, such as a script."""
    return _load_file


class Ended(NamedTuple):
    """Exit code and outputs of a script."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def optimized_compilation() -> None:
    """Optimise compiled programs as those of users, in tests with long computations or of what XLA makes."""


_MAX_PROGRAMS = 400
"""Number of compiled programs after which all are freed: lowering of a program takes longer the more there are alive,
8 ms for a small one in a new process, 29 ms after 2,500."""


@pytest.fixture(autouse=True, scope="module")
def _free_programs() -> Iterator[None]:
    """Free compiled programs between modules, which share few."""
    yield
    if count_compilations() - _freed[0] > _MAX_PROGRAMS:
        jax.clear_caches()
        _freed[0] = count_compilations()


_freed = [0]


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """Return the config file of the tiny experiment."""
    return _load_file(ROOT / "tests" / "support" / "tiny.py")


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory) -> Path:
    """Return a folder that all workers of pytest-xdist share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


def _make_once(folder: Path, make: Callable[[Path], object]) -> Path:
    """Return the folder, made by the first worker that needs it; others wait until it is complete."""
    done = folder.with_suffix(".done")
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def tiny_clips(tiny, shared_folder) -> Path:
    """Return the folder of rendered clips for the tiny experiment. It is read only."""
    from dit_video.scenes import shapes

    write = functools.partial(shapes.write_folder, count=tiny.COUNT, seed=0, sizes=tiny.SIZES)
    return _make_once(shared_folder / "clips", write)


@pytest.fixture(scope="session")
def tiny_run(tiny, tiny_clips, shared_folder) -> Path:
    """Return the folder of a finished run. It is read only: copy it to change it."""
    from dit_video.experiment.run import Run

    def train(folder: Path) -> None:
        quick = jax.config.read("jax_disable_most_optimizations")
        _compile_quickly(True)  # even if a slow test uses this fixture first
        Run.create(folder, tiny.EXPERIMENT).train(tiny_clips)
        _compile_quickly(quick)

    return _make_once(shared_folder / "run", train)


@pytest.fixture(scope="session")
def tiny_pipeline(tiny_run):
    """Return the pipeline of that run."""
    import dit_video

    return dit_video.load(tiny_run)


@pytest.fixture
def memory(monkeypatch, tmp_path) -> str:
    """Return the address of an empty bucket in fsspec's memory. Downloads are stored in `tmp_path/cache`."""
    from fsspec.implementations.memory import MemoryFileSystem

    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return "memory://bucket"


@pytest.fixture
def gcs() -> Iterator[FakeGcs]:
    """Return the empty bucket `gs://bucket` of a server of Google Cloud Storage's API."""
    pytest.importorskip("gcsfs")
    with serve() as gcs:
        yield gcs


@pytest.fixture
def script(monkeypatch, capsys) -> Callable[..., Ended]:
    """Return a function that runs a script in this process: `script("experiments/sample.py", …)`.

    That is faster than another process, which would import everything again.
    """

    def start(path: str, *arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", [str(ROOT / path), *map(str, arguments)])
        monkeypatch.setattr(sys, "path", [str((ROOT / path).parent), *sys.path])
        capsys.readouterr()
        code = 0
        try:
            runpy.run_path(str(ROOT / path), run_name="__main__")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        return Ended(code, *capsys.readouterr())

    return start


@pytest.fixture
def process() -> Callable[..., Ended]:
    """Return a function that runs a script in another process."""

    def start(path: str, *arguments: object, **environment: str) -> Ended:
        command = [sys.executable, str(ROOT / path), *map(str, arguments)]
        inherited = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            command, capture_output=True, text=True, env=inherited | environment, timeout=HANG, check=False
        )
        return Ended(done.returncode, done.stdout, done.stderr)

    return start


@pytest.fixture
def add_package(tmp_path, monkeypatch):
    """Return a function that copies a file of `support/extensions` to a module of another package, and imports it."""
    from dit_video.core import registry

    monkeypatch.setattr(registry, "_CLASSES", {})
    monkeypatch.syspath_prepend(tmp_path)
    imported = []

    def add(name, source):
        shutil.copyfile(ROOT / "tests" / "support" / "extensions" / f"{source}.py", tmp_path / f"{name}.py")
        importlib.invalidate_caches()
        imported.append(name)
        return importlib.import_module(name)

    yield add
    for name in imported:
        sys.modules.pop(name, None)


@pytest.fixture
def install_package(add_package, tmp_path):
    """Return a function that forgets an imported module, which is then the entry point of an installed package."""
    from dit_video.core import registry

    def install(name):
        installed = tmp_path / f"{name}-1.0.dist-info"
        installed.mkdir(exist_ok=True)
        (installed / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (installed / "entry_points.txt").write_text(f"[dit_video]\nadditions = {name}\n")
        sys.modules.pop(name)
        registry.load_entry_points.cache_clear()

    yield install
    registry.load_entry_points.cache_clear()
