"""The documentation holds: pages are linked, code runs, commands exist with their options, and links lead somewhere.

Code blocks of README.md, CONTRIBUTING.md and docs/:

- A `python` block runs, with the page's other blocks in one namespace, from a folder that looks like the repository's
  root. After `<!-- not run: reason -->` it is only parsed, and what it imports from dit_video must exist.
- A `console` block holds commands that begin with `$ `. The arguments of a script are parsed as the script parses them.
  After `<!-- run -->` the commands are run, too; after `<!-- run: slow -->` in a test that is marked `slow`.
"""

import argparse
import functools
import re
from pathlib import Path

import pytest
import tyro

from support.doc_pages import (
    Block,
    blocks,
    broken_links,
    commands,
    count_words,
    exists,
    nav_pages,
    split_command,
    unresolved_imports,
)

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md")))
MAX_README_WORDS = 800
PARSED = 77
"""Exit code of a script whose arguments were parsed and that was stopped there."""


@pytest.fixture
def parse(script, monkeypatch):
    """Return the exit code and the errors of a script that parses its arguments and stops there."""
    parse_command_line = tyro.cli

    def stop(*_, **__):
        raise SystemExit(PARSED)

    def parse_with_tyro(f, *args, **kwargs):
        is_function = not isinstance(f, type)
        parse_command_line(functools.wraps(f)(lambda *_, **__: stop()) if is_function else f, *args, **kwargs)
        stop()

    parse_with_argparse = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser, *args, **kwargs):
        parse_with_argparse(parser, *args, **kwargs)
        stop()

    monkeypatch.setattr(tyro, "cli", parse_with_tyro)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.chdir(ROOT)
    return script


def command_problem(command: str, parse) -> str | None:
    """Return what is wrong with a command, or None."""
    try:
        path, arguments = split_command(command)
    except ValueError as error:
        return str(error)
    if path is None or not path.startswith(("experiments/", "tools/")):
        return None
    ended = parse(path, *arguments)
    return None if ended.code == PARSED or "--help" in arguments else f"{command}: {ended.err or ended.out}"


def run_block(block: Block, name: str, namespace: dict, script) -> None:
    """Run a block's Python, or its commands."""
    if block.language == "python":
        # Empty lines before the text, for errors to name the page's lines.
        exec(compile("\n" * (block.line - 1) + block.text, name, "exec"), namespace)
        return
    for command in commands(block):
        path, arguments = split_command(command)
        assert path is not None, f"{name}:{block.line}: only scripts are run, not {command!r}"
        ended = script(path, *arguments)
        assert ended.code == 0, f"{name}:{block.line}: {command}\n{ended.err}"


def is_run(block: Block, *, slow: bool) -> bool:
    """Return True if a test of the page runs the block."""
    if block.language == "python":
        return not block.mark.startswith("not run:")
    return block.language == "console" and (block.mark == "run" or (slow and block.mark == "run: slow"))


def pages(*, with_slow: bool = False) -> list:
    """Return all pages, or those with slow blocks, as parameters."""
    chosen = [page for page in PAGES if not with_slow or "<!-- run: slow -->" in page.read_text(encoding="utf-8")]
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in chosen]


@pytest.fixture
def copy_of_root(monkeypatch, tmp_path):
    """Work in a folder with the repository's files, in which what is written stays apart from them."""
    for path in ROOT.iterdir():
        if not path.name.startswith(".") and path.name not in ("runs", "data", "clips"):
            (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_page_is_in_the_navigation():
    linked = nav_pages((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(linked) == sorted(page.name for page in DOCS.glob("*.md"))


def test_the_readme_is_short():
    assert count_words((ROOT / "README.md").read_text(encoding="utf-8")) <= MAX_README_WORDS


@pytest.mark.parametrize("page", pages())
def test_code_parses_and_its_imports_exist(page):
    problems = []
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.language == "python":
            problems += [f"{page.name}:{block.line}: {name}" for name in unresolved_imports(block.text)]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("page", pages())
def test_names_of_the_package_in_the_text_exist(page):
    names = set(re.findall(r"\bdit_video(?:\.\w+)+", page.read_text(encoding="utf-8")))
    assert sorted(name for name in names if not exists(name)) == []


@pytest.mark.parametrize("page", pages())
def test_commands_exist_with_their_options(page, parse):
    problems = []
    for block in blocks(page.read_text(encoding="utf-8")):
        for command in commands(block) if block.language == "console" else ():
            if problem := command_problem(command, parse):
                problems.append(f"{page.name}:{block.line}: {problem}")
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("page", pages())
def test_links_lead_somewhere(page):
    assert broken_links(page.read_text(encoding="utf-8"), page.parent) == []


@pytest.mark.slow
@pytest.mark.parametrize("page", pages())
def test_code_runs(page, copy_of_root, script):
    namespace = {"__name__": "page"}
    for block in blocks(page.read_text(encoding="utf-8")):
        if is_run(block, slow=False):
            run_block(block, page.name, namespace, script)


@pytest.mark.slow
@pytest.mark.parametrize("page", pages(with_slow=True))
def test_slow_code_runs(page, copy_of_root, script):
    namespace = {"__name__": "page"}
    for block in blocks(page.read_text(encoding="utf-8")):
        if is_run(block, slow=True):
            run_block(block, page.name, namespace, script)


# The checks fail on what they are for.

FENCE = "`" * 3


def page_of(language: str, text: str, mark: str = "") -> str:
    return "# Title\n\n" + (f"<!-- {mark} -->\n" if mark else "") + f"{FENCE}{language}\n{text}\n{FENCE}\n"


def test_words_are_counted_outside_of_code_and_tables():
    page = page_of("text", "three words more") + "<!-- a comment -->\n| a | [two words](address.md) |\n|---|---|\n"
    assert count_words(page) == len(["Title", "a", "two", "words"])


def test_marks_belong_to_the_next_block():
    page = page_of("python", "x = 1", "not run: needs weights") + "text\n" + page_of("python", "y = 1")
    first, second = blocks(page)
    assert (first.mark, second.mark) == ("not run: needs weights", "")
    assert first == Block("python", "x = 1", 5, "not run: needs weights")
    assert not is_run(first, slow=True)
    assert is_run(second, slow=False)


def test_slow_commands_run_in_slow_tests_alone():
    (block,) = blocks(page_of("console", "$ python experiments/quickstart.py", "run: slow"))
    assert is_run(block, slow=True)
    assert not is_run(block, slow=False)


@pytest.mark.parametrize("page", [f"{FENCE}python\nx = 1\n", page_of("bash", "ls")])
def test_a_block_that_no_test_reads_is_refused(page):
    with pytest.raises(ValueError, match="code block"):
        blocks(page)


@pytest.mark.parametrize(
    ("source", "missing"),
    [
        ("from dit_video.tokens import Grid\nimport dit_video\ndit_video.load", []),
        ("from dit_video.tokens import Lattice", ["dit_video.tokens.Lattice"]),
        ("import dit_video.token", ["dit_video.token"]),
        ("import dit_video\ndit_video.open(FOLDER)", ["dit_video.open"]),
    ],
)
def test_a_missing_import_is_reported(source, missing):
    assert unresolved_imports(source) == missing


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("python experiments/sample.py RUN --prompt 'a dog' --out dog.mp4", None),
        ("python experiments/train.py experiments/configs/clips.py --data CLIPS --denoiser.steps 2000", None),
        ("python tools/plan.py experiments/configs/clips.py --topology v5e:4x4", None),
        ("pip install -e '.[test]'", None),
        ("uv run experiments/quickstart.py", None),
        ("python experiments/train.py experiments/configs/clips.py --data CLIPS --denoiser.turns 20", "turns"),
        ("python experiments/train.py experiments/configs/none.py --data CLIPS", "none.py"),
        ("python experiments/sample.py RUN --prompt 'a dog'", "out"),
        ("python experiments/sample.py RUN --prompt x --out x.mp4 --steps many", "steps"),
        ("python tools/plan.py experiments/configs/clips.py --topologies v5e:4x4", "topolog"),
        ("python experiments/paint.py", "does not exist"),
        ("rm -r runs", "neither known nor a file"),
        ("python experiments/quickstart.py && pip install .", "one command a line"),
    ],
)
def test_a_wrong_command_is_reported(command, problem, parse):
    reported = command_problem(command, parse)
    assert reported is None if problem is None else problem in (reported or ""), reported


def test_a_line_that_is_no_command_is_reported():
    (block,) = blocks(page_of("console", "$ python experiments/quickstart.py\nreport: runs/quickstart"))
    with pytest.raises(ValueError, match="report: runs/quickstart"):
        commands(block)


def test_a_broken_link_is_reported():
    page = (
        "# Two words\n[a](README.md) [b](none.md) [c](#two-words) [d](#none) [e](https://a.b) ![f](none.svg) `[g](g)`"
    )
    assert broken_links(page, ROOT) == ["none.md", "#none", "none.svg"]


def test_failing_code_is_reported(script):
    block = Block("python", "assert dit_video", 3, "")
    with pytest.raises(NameError, match="dit_video"):
        run_block(block, "page.md", {}, script)
    with pytest.raises(AssertionError, match="run_that_is_not"):
        run_block(
            Block("console", "$ python experiments/sample.py run_that_is_not --prompt x --out x.mp4", 1, "run"),
            "page.md",
            {},
            script,
        )


def test_pages_of_the_navigation_are_listed():
    assert nav_pages("nav:\n- Start: a.md\n- More:\n  - b.md\n  - C: c.md\n") == ["a.md", "b.md", "c.md"]
