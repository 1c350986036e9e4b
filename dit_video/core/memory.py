"""Memory: the bytes of arrays and of a traced program, and the error when a device has too few."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Var

from dit_video.core.errors import UserError


def count_peak_bytes(program: ClosedJaxpr) -> int:
    """Return the largest number of bytes that are alive at once, not counting the program's inputs.

    The count assumes that operations run in the order of the trace, and that each stores its result. Compilers fuse
    elementwise operations without storing their results, and need room of their own, so this is an estimate, mostly a
    high one.
    """
    return _count_peak(program.jaxpr)


def count_bytes(tree: Any) -> int:
    """Return the bytes of all arrays, or array shapes, in a tree; random keys count as 0."""
    return sum(map(_count_array_bytes, jax.tree.leaves(tree)))


def format_bytes(number: int | float) -> str:
    """Return a number of bytes in MiB or GiB."""
    return f"{number / 2**30:,.2f} GiB" if number >= 2**28 else f"{number / 2**20:,.1f} MiB"


@contextlib.contextmanager
def name_exhausted_memory(work: str, fix: str) -> Iterator[None]:
    """Raise a UserError with a fix if the devices' memory is exhausted in a `with` block.

    Args:
      work: Name of the block's work, such as "sampling".
      fix: Sentence that says what takes less memory.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).splitlines()[0].removeprefix("RESOURCE_EXHAUSTED: ")
        raise UserError(f"{work} takes more memory than the device has ({reason[:200]}). {fix}") from error


def _count_peak(jaxpr: Jaxpr) -> int:
    last_use: dict[Var, int] = {}
    for number, equation in enumerate(jaxpr.eqns):
        last_use |= {value: number for value in equation.invars if isinstance(value, Var)}
    last_use |= {value: len(jaxpr.eqns) for value in jaxpr.outvars if isinstance(value, Var)}
    alive: dict[Var, int] = {}
    peak = 0
    for number, equation in enumerate(jaxpr.eqns):
        inner = max((_count_peak(each) for each in _list_jaxprs(equation.params)), default=0)
        outputs = {value: _count_array_bytes(value.aval) for value in equation.outvars}
        peak = max(peak, sum(alive.values()) + max(inner, sum(outputs.values())))
        alive |= {value: size for value, size in outputs.items() if value in last_use}
        for value in equation.invars:
            if not isinstance(value, Literal) and last_use.get(value) == number:
                alive.pop(value, None)
    return peak


def _list_jaxprs(params: Any) -> list[Jaxpr]:
    """Return the programs inside an operation: those of calls, loops and branches."""
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, ClosedJaxpr | Jaxpr))
    closed = [leaf.jaxpr if isinstance(leaf, ClosedJaxpr) else leaf for leaf in leaves]
    return [each for each in closed if isinstance(each, Jaxpr)]


def _count_array_bytes(array: Any) -> int:
    """Return the bytes of an array, or of a shape and dtype; 0 for random keys, and for tokens, which have no dtype."""
    dtype = getattr(array, "dtype", None)
    if dtype is None or jax.dtypes.issubdtype(dtype, jax.dtypes.extended):
        return 0
    return math.prod(array.shape) * dtype.itemsize
