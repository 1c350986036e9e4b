"""The start of a script: what a Ctrl-C during its imports, and errors that nobody catches, print."""

import ast
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from dit_video.core.platform import scripts
from support.devices import HANG, PROGRAMS, make_environment

ROOT = Path(__file__).resolve().parents[3]


def run(exception):
    command = [sys.executable, str(PROGRAMS / "interrupted_start.py"), exception]
    return subprocess.run(command, capture_output=True, text=True, env=make_environment(1), timeout=HANG, check=False)


def test_ctrl_c_during_imports_is_one_line():
    done = run("KeyboardInterrupt")
    assert done.stderr.strip() == "interrupted during its start: run the same command again"
    assert done.returncode == -signal.SIGINT


def test_other_exceptions_keep_their_traceback():
    done = run("ZeroDivisionError")
    assert done.stderr.startswith("Traceback")
    assert done.stderr.splitlines()[-1] == "ZeroDivisionError"


@pytest.mark.parametrize(("name", "modules"), [("train", {}), ("__main__", {"jax": sys})])
def test_imported_modules_and_processes_with_jax_are_left_alone(monkeypatch, name, modules):
    before = sys.excepthook
    monkeypatch.setattr(sys, "modules", modules)
    scripts.prepare_script(name)
    assert sys.excepthook is before


def test_a_script_sets_the_flags_of_accelerators_before_it_imports_jax(monkeypatch):
    calls = []
    monkeypatch.setattr(scripts, "set_accelerator_flags", lambda: calls.append("set"))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setattr(sys, "modules", {})
    scripts.prepare_script("__main__", huge_pages=False)
    assert calls == ["set"]


def test_writes_whose_event_loop_is_closed_report_nothing(monkeypatch):
    shown = []
    monkeypatch.setattr(sys, "__unraisablehook__", lambda unraisable: shown.append(str(unraisable.exc_value)))
    monkeypatch.setattr(scripts, "set_accelerator_flags", lambda: None)
    for name in ("excepthook", "unraisablehook"):
        monkeypatch.setattr(sys, name, getattr(sys, name))
    with monkeypatch.context() as patch:
        patch.setattr(sys, "modules", {})
        scripts.prepare_script("__main__", huge_pages=False)
    for message in ("Event loop is closed", "another error"):
        sys.unraisablehook(SimpleNamespace(exc_value=RuntimeError(message), object=None))
    assert shown == ["another error"]


def test_every_script_prepares_itself_first():
    for path in [*(ROOT / "experiments").glob("*.py"), *(ROOT / "tools").glob("*.py")]:
        source = path.read_text(encoding="utf-8")
        if "__main__" not in source:
            continue
        body = ast.parse(source).body[1:3]  # after the docstring
        assert ast.unparse(body[0]) == "from dit_video.core.platform.scripts import prepare_script", path
        assert ast.unparse(body[1]).startswith("prepare_script(__name__"), path


# Processes that start again with memory in pages of 2 MB


TUNABLE = "glibc.malloc.hugetlb=1"


@pytest.fixture
def started(monkeypatch, tmp_path):
    """Return the list of commands that replace this process, on a system that gives huge pages on request."""
    result = []
    setting = tmp_path / "enabled"
    setting.write_text("always [madvise] never\n")
    monkeypatch.setattr(scripts, "_SETTING", setting)
    monkeypatch.setattr(os, "confstr", lambda _: "glibc 2.36", raising=False)
    monkeypatch.setattr(os, "execv", lambda path, arguments: result.append((path, arguments)))
    monkeypatch.setattr(sys, "orig_argv", ["python", "-X", "dev", "train.py", "--steps", "3"])
    monkeypatch.setattr(sys, "gettrace", lambda: None)
    monkeypatch.delitem(sys.modules, "jax", raising=False)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    return result


def test_a_process_starts_again_with_its_own_command(started):
    scripts.use_huge_pages("__main__")
    assert started == [(sys.executable, [sys.executable, "-X", "dev", "train.py", "--steps", "3"])]
    assert os.environ["GLIBC_TUNABLES"] == TUNABLE
    scripts.use_huge_pages("__main__")
    assert len(started) == 1


def test_other_tunables_of_glibc_stay(started, monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=2")
    scripts.use_huge_pages("__main__")
    assert started
    assert os.environ["GLIBC_TUNABLES"] == f"glibc.malloc.arena_max=2:{TUNABLE}"


def test_an_imported_module_does_not_start_the_process_again(started):
    scripts.use_huge_pages("train")
    assert not started


def test_a_process_that_imported_jax_is_not_started_again(started, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", sys)
    scripts.use_huge_pages("__main__")
    assert not started


def test_a_huge_page_setting_of_the_user_stays(started, monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0")
    scripts.use_huge_pages("__main__")
    assert not started


def test_a_process_under_a_debugger_is_not_started_again(started, monkeypatch):
    monkeypatch.setattr(sys, "gettrace", lambda: print)
    scripts.use_huge_pages("__main__")
    assert not started


@pytest.mark.parametrize("setting", ["[always] madvise never", "always madvise [never]", None])
def test_a_system_that_gives_huge_pages_to_all_or_to_nobody_is_left_alone(started, tmp_path, setting):
    (tmp_path / "enabled").unlink() if setting is None else (tmp_path / "enabled").write_text(setting)
    scripts.use_huge_pages("__main__")
    assert not started


@pytest.mark.parametrize("library", ["glibc 2.31", "musl 1.2", ValueError("unrecognized configuration name")])
def test_an_old_or_other_c_library_is_left_alone(started, monkeypatch, library):
    def confstr(_):
        if isinstance(library, Exception):
            raise library
        return library

    monkeypatch.setattr(os, "confstr", confstr)
    scripts.use_huge_pages("__main__")
    assert not started


def test_a_real_script_starts_again_with_its_arguments():
    if not scripts._is_available():
        pytest.skip("this system does not give huge pages to those who ask")
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    command = [sys.executable, str(PROGRAMS / "huge_pages.py"), "--steps", "3"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["before", "before", f"{TUNABLE} ['--steps', '3']"]
