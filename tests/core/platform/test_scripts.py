"""The start of a script: what a Ctrl-C during its imports prints."""

import ast
import signal
import subprocess
import sys
from pathlib import Path

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
    monkeypatch.setattr(sys, "modules", {})
    scripts.prepare_script("__main__", huge_pages=False)
    assert calls == ["set"]


def test_every_script_prepares_itself_first():
    for path in [*(ROOT / "experiments").glob("*.py"), *(ROOT / "tools").glob("*.py")]:
        source = path.read_text(encoding="utf-8")
        if "__main__" not in source:
            continue
        body = ast.parse(source).body[1:3]  # after the docstring
        assert ast.unparse(body[0]) == "from dit_video.core.platform.scripts import prepare_script", path
        assert ast.unparse(body[1]).startswith("prepare_script(__name__"), path
