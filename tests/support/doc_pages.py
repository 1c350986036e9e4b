"""Pages of the documentation: their code blocks, commands, links and headings."""

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import yaml

ROOT = Path(__file__).resolve().parents[2]
LANGUAGES = {"python", "console", "text", "", "csv", "json", "yaml"}
PROGRAMS = {"python", "python3", "pip", "git", "uv", "source", "ruff", "mypy", "cd", "nohup"}
"""Programs that a command may start besides files of the repository."""


class Block(NamedTuple):
    """A fenced code block of a page."""

    language: str
    text: str
    line: int
    """Line of the page on which the text begins, from 1."""
    mark: str
    """Comment before the block, such as `run`, `run: slow` or `not run: needs weights`; empty without one."""


def blocks(page: str) -> list[Block]:
    """Return the fenced code blocks of a page.

    Raises:
      ValueError: if a fence is not closed, or a language is not checked.
    """
    result, mark, lines = [], "", iter(enumerate(page.split("\n"), start=1))
    for number, line in lines:
        if comment := re.fullmatch(r"\s*<!--\s*(.*?)\s*-->\s*", line):
            mark = comment[1]
        elif fence := re.fullmatch(r"\s*(`{3,})(\w*)\s*", line):
            text = []
            for _, inner in lines:
                if inner.strip() == fence[1]:
                    break
                text.append(inner)
            else:
                raise ValueError(f"line {number}: the code block is not closed")
            if fence[2] not in LANGUAGES:
                raise ValueError(f"line {number}: code blocks of '{fence[2]}' are not checked; use {sorted(LANGUAGES)}")
            indent = len(line) - len(line.lstrip())
            result.append(Block(fence[2], "\n".join(part[indent:] for part in text), number + 1, mark))
            mark = ""
        elif line.strip():
            mark = ""
    return result


def prose(page: str) -> str:
    """Return a page without code blocks and comments."""
    return re.sub(r"^\s*(`{3,})\w*\n.*?^\s*\1\s*$|<!--.*?-->", "", page, flags=re.DOTALL | re.MULTILINE)


def count_words(page: str) -> int:
    """Return the number of words outside of code blocks; addresses of links and the lines of tables are none."""
    text = re.sub(r"\]\([^)]*\)", "]", prose(page))
    return sum(any(map(str.isalnum, word)) for word in re.split(r"[\s|]+", text))


def commands(block: Block) -> list[str]:
    """Return the commands of a console block, each on one line.

    Raises:
      ValueError: if a line is not a command.
    """
    lines = [line for line in block.text.replace("\\\n", " ").split("\n") if line.strip()]
    for line in lines:
        if not line.startswith("$ "):
            raise ValueError(f"{line!r} in a console block is no command; begin it with '$ '")
    return [line.removeprefix("$ ") for line in lines]


def split_command(command: str) -> tuple[str | None, list[str]]:
    """Return the script that a command starts, relative to the repository's root, and its arguments, if it starts one.

    Raises:
      ValueError: if the program is unknown, or its file does not exist.
    """
    words = shlex.split(command, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    for joint in ("&&", "&", "|", ">", ";"):
        if joint in words:
            raise ValueError(f"{command!r} holds {joint}; write one command a line")
    if words[:2] == ["uv", "run"]:
        words = ["python", *words[2:]]
    program, *arguments = [word.removeprefix(".venv/bin/") for word in words[:1]] + words[1:]
    if program not in PROGRAMS and not (ROOT / program).is_file():
        raise ValueError(f"{command!r} starts {program}, which is neither known nor a file")
    if program not in ("python", "python3") or not arguments or arguments[0].startswith("-"):
        return None, arguments
    if not (ROOT / arguments[0]).is_file():
        raise ValueError(f"{command!r} starts {arguments[0]}, which does not exist")
    return arguments[0], arguments[1:]


def unresolved_imports(source: str) -> list[str]:
    """Return the names that code imports from dit_video, or reads as `dit_video.…`, and that do not exist.

    Raises:
      SyntaxError: if the code is no Python.
    """
    tree, names = ast.parse(source), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute) and re.fullmatch(r"dit_video(\.\w+)+", ast.unparse(node)):
            names.append(ast.unparse(node))
    return [name for name in names if name.split(".")[0] == "dit_video" and not exists(name)]


def exists(name: str) -> bool:
    """Return True if a dotted name is a module or what one holds."""
    value: object = importlib.import_module(name.split(".")[0])
    for index, part in enumerate(name.split(".")[1:], start=2):
        if isinstance(value, ModuleType) and not hasattr(value, part):
            try:
                value = importlib.import_module(".".join(name.split(".")[:index]))
                continue
            except ModuleNotFoundError:
                return False
        if not hasattr(value, part):
            return False
        value = getattr(value, part)
    return True


def anchors(page: str) -> Iterator[str]:
    """Yield the anchors of a page's headings, as GitHub and MkDocs derive them."""
    for title in re.findall(r"^#+ (.+?)\s*$", prose(page), flags=re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", re.sub(r"\[(.*?)\]\(.*?\)", r"\1", title).lower()).strip()
        yield slug.replace(" ", "-")
        yield re.sub(r"[-\s]+", "-", slug)


def broken_links(page: str, folder: Path) -> list[str]:
    """Return the links of a page that lead to no file, or to no heading of a page."""
    text = re.sub(r"`[^`\n]*`", "", prose(page))
    targets = re.findall(r"\]\(\s*<?([^)\s>]+)>?[^)]*\)", text) + re.findall(r"""(?:src|href)=["']([^"']+)""", text)
    broken = []
    for target in targets:
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = folder / name if name else None
        if path is not None and not path.exists():
            broken.append(target)
        elif anchor and (path is None or path.suffix == ".md"):
            content = page if path is None else path.read_text(encoding="utf-8")
            broken += [] if anchor in anchors(content) else [target]
    return broken


def nav_pages(config: str) -> list[str]:
    """Return the pages in the navigation of an mkdocs.yml, in order."""

    def walk(entry) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        else:
            for part in entry.values() if isinstance(entry, dict) else entry:
                yield from walk(part)

    return list(walk(yaml.safe_load(config)["nav"]))
