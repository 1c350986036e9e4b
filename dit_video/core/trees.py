"""Nested dictionaries of arrays, addressed by paths such as `blocks/attention/query/kernel`."""

import difflib
import functools
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from dit_video.core.errors import UserError

_format_path = functools.partial(jax.tree_util.keystr, simple=True, separator="/")


def flatten(tree: Any, *, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """Return leaves by path, in tree order."""
    return {_format_path(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf)[0]}


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Return the nested dictionary with these leaves."""
    return traverse_util.unflatten_dict(leaves, sep="/")


def map_with_path(
    function: Callable[[str, Any], Any], tree: Any, *, is_leaf: Callable[[Any], bool] | None = None
) -> Any:
    """Apply `function(path, leaf)` to every leaf."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: function(_format_path(path), leaf), tree, is_leaf=is_leaf
    )


def count_values(tree: Any) -> int:
    """Return the number of values in all leaves."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def check_patterns(**patterns: Iterable[str]) -> None:
    """Check that the value of each field is a tuple of patterns: regular expressions that are searched in paths.

    Raises:
      UserError: If a value is a string, each of whose characters would be a pattern, or if a pattern is not a regular
        expression.
    """
    for field, value in patterns.items():
        if isinstance(value, str):
            raise UserError(f"{field}={value!r} is invalid: it must be a tuple of patterns. Use {field}=({value!r},).")
        for pattern in value:
            try:
                re.compile(pattern)
            except (re.error, TypeError) as error:
                rule = f"it must be a regular expression for paths of parameters ({error})"
                raise UserError(f"{field}={pattern!r} is invalid: {rule}. Use a path, such as 'blocks/'.") from error


def check_path_patterns(field: str, patterns: Iterable[str], paths: Collection[str]) -> None:
    """Check that each pattern, a regular expression that is searched in paths, matches one of them.

    Raises:
      UserError: If a pattern matches no path.
    """
    for pattern in patterns:
        if not any(re.search(pattern, path) for path in paths):
            closest = find_closest(pattern, paths)
            raise UserError(f"{field}={pattern!r} is invalid: it matches no parameter. Use the path of one: {closest}.")


def find_closest(pattern: str, paths: Iterable[str]) -> str:
    """Return paths, or beginnings and ends of paths, that resemble a pattern, as suggestions for a misspelt one."""
    word = re.sub(r"[^\w/]", "", pattern).strip("/")
    parts = {part for path in paths for part in (path, *_split_path(path))}
    return ", ".join(difflib.get_close_matches(word, sorted(parts), n=3, cutoff=0.0))


def _split_path(path: str) -> Iterator[str]:
    names = path.split("/")
    for cut in range(1, len(names)):
        yield "/".join(names[:cut])
        yield "/".join(names[cut:])
