"""Products as accelerators compute them by default: with rounded operands."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from support.jaxprs import count_primitive

MANTISSA_BITS = {"bfloat16": 7, "tf32": 10}
"""Bits of the mantissa to which a product's float32 operands are rounded: on TPUs, and on GPUs."""
_HIGHEST = (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)


def round_products(function: Callable[..., Any], rounding: str) -> Callable[..., Any]:
    """Return a function whose float32 products round their operands, unless their precision is `HIGHEST`.

    Its operations are computed one by one, so that XLA doesn't drop a conversion to bfloat16 and back.
    """

    def run(*args: Any) -> Any:
        # A new function, so that it is traced again for another platform.
        program, shapes = jax.make_jaxpr(lambda *values: function(*values), return_shape=True)(*args)
        values = _evaluate(program.jaxpr, program.consts, jax.tree.leaves(args), MANTISSA_BITS[rounding])
        return jax.tree.unflatten(jax.tree.structure(shapes), values)

    return run


def _evaluate(jaxpr: Any, consts: Any, args: Any, mantissa_bits: int) -> list[Any]:
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    for equation in jaxpr.eqns:
        operands = [read(atom) for atom in equation.invars]
        inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
        if equation.primitive.name in ("jit", "custom_jvp_call", "remat2", "checkpoint"):
            results = _evaluate(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), operands, mantissa_bits)
        else:
            assert inner is None or not count_primitive("dot_general", getattr(inner, "jaxpr", inner)), equation
            if equation.primitive.name == "dot_general" and equation.params["precision"] != _HIGHEST:
                operands = [_round(operand, mantissa_bits) for operand in operands]
            bound = equation.primitive.bind(*operands, **equation.params)
            results = bound if equation.primitive.multiple_results else [bound]
        values |= zip(equation.outvars, results, strict=True)
    return [read(atom) for atom in jaxpr.outvars]


def _round(operand: Any, mantissa_bits: int) -> Any:
    if operand.dtype != jnp.float32:
        return operand
    return jax.lax.reduce_precision(operand, exponent_bits=8, mantissa_bits=mantissa_bits)
