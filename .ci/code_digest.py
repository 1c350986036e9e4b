"""The version of the code that a harness has checked: results of another one do not count.

Comments and docstrings are no part of it.
"""

import ast
import hashlib
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def compute_digest(*more: Path) -> str:
    """Return a digest of the package and of further files."""
    return digest_files([*(ROOT / "dit_video").rglob("*.py"), *more])


def digest_files(paths: Iterable[Path]) -> str:
    """Return a digest of the names and the code of files of the project."""
    content = hashlib.sha256()
    for path in sorted(paths):
        code = path.read_text(encoding="utf-8")
        if path.suffix == ".py":
            code = ast.dump(_DropStrings().visit(ast.parse(code)))
        content.update(f"{path.relative_to(ROOT).as_posix()} {code}".encode())
    return content.hexdigest()[:12]


class _DropStrings(ast.NodeTransformer):
    """Removal of strings that are statements: docstrings, also of fields and constants."""

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        is_string = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if is_string else node
