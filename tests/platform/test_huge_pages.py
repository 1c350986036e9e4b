"""Memory in pages of 2 MB."""

import os
import subprocess
import sys

import pytest

from dit_video.platform import huge_pages

TUNABLE = "glibc.malloc.hugetlb=1"


@pytest.fixture
def started(monkeypatch, tmp_path):
    """What is executed in the process' place, on a system that gives huge pages to those who ask."""
    found = []
    setting = tmp_path / "enabled"
    setting.write_text("always [madvise] never\n")
    monkeypatch.setattr(huge_pages, "_SETTING", setting)
    monkeypatch.setattr(os, "confstr", lambda _: "glibc 2.36", raising=False)
    monkeypatch.setattr(os, "execv", lambda path, arguments: found.append((path, arguments)))
    monkeypatch.setattr(sys, "orig_argv", ["python", "-X", "dev", "train.py", "--steps", "3"])
    monkeypatch.setattr(sys, "gettrace", lambda: None)
    monkeypatch.delitem(sys.modules, "jax", raising=False)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    return found


def test_started_again_as_it_was(started):
    huge_pages.use_huge_pages("__main__")
    assert started == [(sys.executable, [sys.executable, "-X", "dev", "train.py", "--steps", "3"])]
    assert os.environ["GLIBC_TUNABLES"] == TUNABLE
    huge_pages.use_huge_pages("__main__")
    assert len(started) == 1


def test_other_tunables_stay(started, monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=2")
    huge_pages.use_huge_pages("__main__")
    assert started
    assert os.environ["GLIBC_TUNABLES"] == f"glibc.malloc.arena_max=2:{TUNABLE}"


def test_not_in_a_module(started):
    huge_pages.use_huge_pages("train")
    assert not started


def test_not_where_jax_is(started, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", sys)
    huge_pages.use_huge_pages("__main__")
    assert not started


def test_a_choice_stays(started, monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0")
    huge_pages.use_huge_pages("__main__")
    assert not started


def test_not_under_a_debugger(started, monkeypatch):
    monkeypatch.setattr(sys, "gettrace", lambda: print)
    huge_pages.use_huge_pages("__main__")
    assert not started


@pytest.mark.parametrize("setting", ["[always] madvise never", "always madvise [never]", None])
def test_not_where_linux_gives_them_to_all_or_to_nobody(started, tmp_path, setting):
    (tmp_path / "enabled").unlink() if setting is None else (tmp_path / "enabled").write_text(setting)
    huge_pages.use_huge_pages("__main__")
    assert not started


@pytest.mark.parametrize("library", ["glibc 2.31", "musl 1.2", ValueError("unrecognized configuration name")])
def test_not_with_another_library(started, monkeypatch, library):
    def confstr(_):
        if isinstance(library, Exception):
            raise library
        return library

    monkeypatch.setattr(os, "confstr", confstr)
    huge_pages.use_huge_pages("__main__")
    assert not started


def test_a_script(tmp_path):
    if not huge_pages._is_available():
        pytest.skip("this system does not give huge pages to those who ask")
    script = tmp_path / "script.py"
    script.write_text(
        "from dit_video.platform.huge_pages import use_huge_pages\n"
        "print('before', flush=True)\n"
        "use_huge_pages(__name__)\n"
        "import os, sys\n"
        "print(os.environ['GLIBC_TUNABLES'], sys.argv[1:])\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    command = [sys.executable, str(script), "--steps", "3"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["before", "before", f"{TUNABLE} ['--steps', '3']"]
