"""What a traced program consists of."""

from typing import Any


def times(primitive: str, jaxpr: Any) -> int:
    """How often an operation stands in a program; in a loop's body once."""
    inner = [
        sub.jaxpr if hasattr(sub, "jaxpr") else sub
        for equation in jaxpr.eqns
        for value in equation.params.values()
        for sub in (value if isinstance(value, (tuple, list)) else [value])
        if hasattr(sub, "eqns") or hasattr(getattr(sub, "jaxpr", None), "eqns")
    ]
    own = sum(equation.primitive.name == primitive for equation in jaxpr.eqns)
    return own + sum(times(primitive, each) for each in inner)
