"""Operations of traced and of lowered programs."""

from typing import Any


def find_branches(jaxpr: Any) -> list[Any]:
    """Return the branches of the first condition in a program, the cheapest first; none without a condition."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "cond":
            branches = [branch.jaxpr for branch in equation.params["branches"]]
            return sorted(branches, key=lambda branch: len(branch.eqns))
        for value in equation.params.values():
            if hasattr(value, "jaxpr") and (found := find_branches(value.jaxpr)):
                return found
    return []


def count_primitive(primitive: str, jaxpr: Any) -> int:
    """Return how often an operation occurs in a program; in a loop's body it counts once."""
    inner = [
        sub.jaxpr if hasattr(sub, "jaxpr") else sub
        for equation in jaxpr.eqns
        for value in equation.params.values()
        for sub in (value if isinstance(value, (tuple, list)) else [value])
        if hasattr(sub, "eqns") or hasattr(getattr(sub, "jaxpr", None), "eqns")
    ]
    own = sum(equation.primitive.name == primitive for equation in jaxpr.eqns)
    return own + sum(count_primitive(primitive, each) for each in inner)


def list_products(text: str) -> list[str]:
    """Return the lines of the matrix products of a lowered program's text (StableHLO)."""
    return [line for line in text.splitlines() if "stablehlo.dot_general" in line]
