"""Names are those of the field: docs/glossary.md lists what was retired, and the rules of docs/architecture.md hold."""

import ast
import functools
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("dit_video", "experiments", "tools", "tests")
GLOSSARY = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")

EXCEPTIONS: dict[str, str] = {}
"""Retired identifiers that the code still has, with the reason."""

GERUNDS = {
    *("training", "conditioning", "packing", "bucketing", "planning", "loading"),
    *("typing", "streaming", "sharding", "logging", "tiling", "embedding"),
}
"""Words in -ing that are terms of the field, and may name a module."""
NOUNS = {"mapping", "prompt_following", "ring", "string", "variance_preserving"}
"""Names of modules that end like a gerund and are none, or that are terms as a whole."""
PREPOSITIONS = {
    *("about", "above", "after", "against", "along", "among", "at", "before", "behind", "below", "beside", "between"),
    *("by", "during", "for", "from", "in", "into", "of", "off", "on", "onto", "out", "over", "since", "through", "to"),
    *("toward", "under", "until", "up", "upon", "with", "within", "without"),
}
OPENINGS = re.compile(r"(What|Of|As|At|That|How)\b")
"""Words with which a fragment begins, rather than a sentence or a noun phrase."""


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def read_notebook(path: Path) -> str:
    """Return the code of a notebook as one source."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def retired_words(glossary: str) -> dict[str, str]:
    """Return the identifiers of the table "Retired words", each with what to use instead."""
    section = re.search(r"^## Retired words$(.*?)(?=^## |\Z)", glossary, flags=re.DOTALL | re.MULTILINE)
    assert section, "the glossary has no section 'Retired words'"
    rows = re.findall(r"^\| *`([^`]+)` *\| *(.+?) *\|$", section[1], flags=re.MULTILINE)
    assert not (twice := [word for word, count in Counter(word for word, _ in rows).items() if count > 1]), twice
    return dict(rows)


parse = functools.cache(ast.parse)  # of a file's text; several tests read all files


def identifiers(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield all identifiers of a file, each with its line."""
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 1)
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name) | ast.keyword(arg=name):
                names = [name]
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef() | ast.ExceptHandler():
                names = [node.name]
            case ast.MatchAs(name=name) | ast.MatchStar(name=name):
                names = [name]
            case ast.Global() | ast.Nonlocal():
                names = [*node.names]
            case ast.alias():
                names = [*node.name.split("."), node.asname]
            case ast.ImportFrom():
                names = (node.module or "").split(".")
            case _:
                names = []
        yield from ((name, line) for name in names if name)


def module_words(path: Path) -> tuple[str, ...]:
    """Return the names that a file gives to modules: its own, or its folder's."""
    return (path.parent.name,) if path.name == "__init__.py" else (path.stem,)


def uses_of_retired_words(source: str, retired: dict[str, str], *, names: tuple[str, ...] = ()) -> list[str]:
    """Return the retired identifiers of a source, and of the names of its modules, with what to use instead."""
    used = [*((name, 1) for name in names), *identifiers(parse(source))]
    return [f"line {line}: {name}; use {retired[name]}" for name, line in used if name in retired]


def public_classes(tree: ast.Module) -> Iterator[str]:
    """Yield the public classes of a module, and its aliases that are named like classes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield node.name
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else ()
        for target in targets:
            if isinstance(target, ast.Name) and re.fullmatch(r"[A-Z][A-Za-z0-9]*[a-z][A-Za-z0-9]*", target.id):
                yield target.id


def doubled_classes(trees: dict[str, ast.Module]) -> list[str]:
    """Return the names that more than one class of several modules has, each with its modules."""
    modules: dict[str, list[str]] = {}
    for module, tree in trees.items():
        for name in public_classes(tree):
            modules.setdefault(name, []).append(module)
    return [f"{name}: {', '.join(places)}" for name, places in sorted(modules.items()) if len(places) > 1]


def is_module_name(name: str) -> bool:
    """Return True if a module's name is no preposition, and does not end with a gerund."""
    last = name.strip("_").split("_")[-1]
    is_gerund = last.endswith("ing") and last not in GERUNDS | NOUNS and name not in NOUNS
    return not is_gerund and name not in PREPOSITIONS


def docstrings(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Yield the docstrings of a module, its classes, functions and attributes, each with its line."""
    for node in ast.walk(tree):
        is_documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if is_documented and (text := ast.get_docstring(node)):
            yield text, node.body[0].lineno
        if isinstance(node, ast.Module | ast.ClassDef):
            for field, note in zip(node.body, node.body[1:], strict=False):
                is_text = isinstance(note, ast.Expr) and isinstance(note.value, ast.Constant)
                if isinstance(field, ast.Assign | ast.AnnAssign) and is_text and isinstance(note.value.value, str):
                    yield note.value.value.strip(), note.lineno


def fragments(source: str) -> list[str]:
    """Return the docstrings of a source that begin as a fragment does."""
    return [f"line {line}: {text.splitlines()[0]}" for text, line in docstrings(parse(source)) if OPENINGS.match(text)]


def test_no_identifier_is_retired():
    retired = {word: use for word, use in retired_words(GLOSSARY).items() if word not in EXCEPTIONS}
    assert retired
    used = [
        f"{relative(path)}, {use}"
        for path in sources(*FOLDERS)
        for use in uses_of_retired_words(path.read_text(encoding="utf-8"), retired, names=module_words(path))
    ]
    assert not used, "\n".join(used)


@pytest.mark.parametrize("path", sorted(ROOT.glob("experiments/**/*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_is_written_like_a_module(path):
    source = read_notebook(path)
    assert not uses_of_retired_words(source, retired_words(GLOSSARY))
    assert not fragments(source)


def test_every_exception_is_needed():
    """An identifier that is gone leaves the list, and one that is not retired needs no exception."""
    assert EXCEPTIONS.keys() <= retired_words(GLOSSARY).keys()
    used = {
        name
        for path in sources(*FOLDERS)
        for name in (*module_words(path), *(name for name, _ in identifiers(parse(path.read_text("utf-8")))))
    }
    assert EXCEPTIONS.keys() - used == set()


def test_no_public_class_name_exists_twice():
    trees = {relative(path): parse(path.read_text(encoding="utf-8")) for path in sources("dit_video")}
    assert doubled_classes(trees) == []


def test_modules_are_named_by_nouns():
    names = {relative(path): module_words(path)[0] for path in sources("dit_video", "experiments", "tools")}
    assert [path for path, name in names.items() if not is_module_name(name)] == []


def test_no_docstring_begins_as_a_fragment():
    result = [
        f"{relative(path)}, {fragment}"
        for path in sources(*FOLDERS)
        for fragment in fragments(path.read_text(encoding="utf-8"))
    ]
    assert not result, "\n".join(result)


# The checks fail on what they are for.


def test_the_table_of_retired_words_is_read():
    glossary = (
        "## Words\n| `clip` | a video |\n## Retired words\n\n| retired | use |\n|---|---|\n| `told` | `model_time` |\n"
    )
    assert retired_words(glossary) == {"told": "`model_time`"}
    with pytest.raises(AssertionError, match="Retired"):
        retired_words("## Words\n")
    with pytest.raises(AssertionError, match="told"):
        retired_words(f"{glossary}| `told` | `time` |\n")


@pytest.mark.parametrize(
    "source",
    [
        "told = 1",
        "x.told",
        "def told(): ...",
        "class told: ...",
        "def f(told): ...",
        "f(told=1)",
        "lambda told: 1",
        "from dit_video.told import f",
        "from dit_video import told",
        "import dit_video.told.x",
        "import x as told",
        "try: ...\nexcept E as told: ...",
        "match x:\n case [told]: ...",
        "match x:\n case [*told]: ...",
        "def f():\n global told",
        "for told in x: ...",
        "(told := 1)",
        "class A:\n told: int = 1",
    ],
)
def test_a_retired_identifier_is_reported(source):
    assert uses_of_retired_words(source, {"told": "`model_time`"})[0].endswith("told; use `model_time`")


def test_the_name_of_a_module_is_an_identifier():
    path = ROOT / "dit_video" / "told" / "__init__.py"
    assert uses_of_retired_words("", {"told": "x"}, names=module_words(path)) == ["line 1: told; use x"]
    assert module_words(path.with_name("feed.py")) == ("feed",)


def test_parts_of_identifiers_and_text_are_not_reported():
    source = '"""told"""\nuntold = "told"  # told\ntold_once = 1'
    assert uses_of_retired_words(source, {"told": "`model_time`"}) == []


def test_a_doubled_class_is_reported():
    trees = {"a.py": parse("class Row: ..."), "b.py": parse("class _Row: ...\nRow = int | str\nROW = 1")}
    assert doubled_classes(trees) == ["Row: a.py, b.py"]
    assert doubled_classes({"a.py": trees["a.py"], "b.py": parse("from a import Row")}) == []


@pytest.mark.parametrize("name", ["watching", "given_starting", "_encoding", "at", "over", "beside"])
def test_a_gerund_or_preposition_is_no_module_name(name):
    assert not is_module_name(name)


@pytest.mark.parametrize(
    "name", ["training", "bin_packing", "training_config", "to_rgb", "__init__", "io", "image_to_video", "ring"]
)
def test_a_noun_is_a_module_name(name):
    assert is_module_name(name)


@pytest.mark.parametrize(
    "source",
    [
        '"""What is in the file."""',
        'class A:\n    """Of a clip."""',
        'def f():\n    """How it is done."""',
        'class A:\n    async def f():\n        """That which it does."""',
        'class A:\n    steps: int = 1\n    """At which it ends."""',
        'LIMIT = 1\n"""As many as there may be."""',
    ],
)
def test_a_fragment_is_reported(source):
    assert len(fragments(source)) == 1


def test_sentences_and_other_strings_are_no_fragments():
    source = (
        '"""Whatever the size, one program."""\ndef f():\n    """Asymptotic bound."""\n    x = 1\n    "Of a string."\n'
    )
    assert fragments(source) == []
