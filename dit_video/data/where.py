"""Conditions on the columns of a table, such as `motion > 5 and sharpness > 60`.

The language is a part of Python's: comparisons (also chained), `and`, `or`, `not`, `in`, arithmetic, numbers, strings,
lists, True and False, and `column is None` for a missing value (null or NaN). `'dog' in captions` holds if a text
contains the word. As in SQL, a comparison with a missing value does not select the row. Integers have 64 bits.
"""

import ast
from collections.abc import Callable, Collection
from typing import Any, NoReturn, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc

from dit_video.core.errors import UserError

Column: TypeAlias = Any
"""One of Arrow's arrays or scalars."""
_COMPARISONS = {
    ast.Eq: pc.equal,
    ast.NotEq: pc.not_equal,
    ast.Lt: pc.less,
    ast.LtE: pc.less_equal,
    ast.Gt: pc.greater,
    ast.GtE: pc.greater_equal,
}
_ARITHMETIC = {
    ast.Add: pc.add_checked,
    ast.Sub: pc.subtract_checked,
    ast.Mult: pc.multiply_checked,
    ast.Div: pc.divide,
}


def list_columns(where: str) -> set[str]:
    """Return the names of the columns that a condition reads.

    Raises:
      UserError: If the condition is no expression.
    """
    return {node.id for node in ast.walk(_parse(where)) if isinstance(node, ast.Name)}


def evaluate(where: str, get_column: Callable[[str], pa.ChunkedArray], names: Collection[str]) -> pa.ChunkedArray:
    """Return a Boolean for every row of a table: whether it meets the condition; null counts as False.

    Args:
      where: The condition.
      get_column: Returns the column of a name.
      names: Names of all columns.

    Raises:
      UserError: If the condition is no expression of the language, names an unknown column, compares text to numbers,
        or computes an integer of more than 64 bits.
    """
    root = _parse(where)
    if unknown := sorted(list_columns(where) - set(names)):
        raise UserError(f"where={where!r} is invalid: there is no column {unknown[0]}. Use {', '.join(sorted(names))}.")
    try:
        result = _Evaluator(where, get_column).visit(root)
        if not pa.types.is_boolean(result.type) or isinstance(result, pa.Scalar):
            raise UserError(f"where={where!r} is invalid: it is not a condition on columns. Use one as 'motion > 5'.")
        return pc.fill_null(result, False)
    except pa.ArrowException as error:
        reason = str(error).splitlines()[0]
        fix = "Use a decimal number, such as 1.0 * frames" if reason == "overflow" else "Compare values of one type"
        raise UserError(f"where={where!r} is invalid: {reason}. {fix}.") from error
    except RecursionError as error:
        raise UserError(f"where={where[:80]!r}… is invalid: it is nested too deeply. Use a shorter one.") from error


def _parse(where: str) -> ast.expr:
    try:
        return ast.parse(where.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        fix = "Use comparisons of columns, such as 'motion > 5 and sharpness > 60'"
        raise UserError(f"where={where!r} is invalid: it is not an expression ({error}). {fix}.") from error


class _Evaluator(ast.NodeVisitor):
    """An evaluator of expressions over Arrow's arrays."""

    def __init__(self, where: str, get_column: Callable[[str], pa.ChunkedArray]):
        self._where, self._get_column = where, get_column

    def generic_visit(self, node: ast.AST) -> Any:
        self._refuse(node, "is not supported", "comparisons, and, or, not, in, + - * /")

    def _refuse(self, node: ast.AST, rule: str, fix: str) -> NoReturn:
        raise UserError(f"where={self._where!r} is invalid: {ast.unparse(node)!r} {rule}. Use {fix}.")

    def visit_Name(self, node: ast.Name) -> Column:
        column = self._get_column(node.id)
        if pa.types.is_floating(column.type):
            column = pc.if_else(pc.is_null(column, nan_is_null=True), None, column)
        return column

    def visit_Constant(self, node: ast.Constant) -> Column:
        if not isinstance(node.value, bool | int | float | str):
            self.generic_visit(node)
        try:
            return pa.scalar(node.value)
        except (OverflowError, UnicodeEncodeError):
            self._refuse(node, "is not a value that a column can have", "an integer below 2**63, a decimal or a text")

    def visit_BoolOp(self, node: ast.BoolOp) -> Column:
        combine = pc.and_kleene if isinstance(node.op, ast.And) else pc.or_kleene
        result, *others = map(self.visit, node.values)
        for other in others:
            result = combine(result, other)
        return result

    def visit_UnaryOp(self, node: ast.UnaryOp) -> Column:
        if isinstance(node.op, ast.Not):
            return pc.invert(self.visit(node.operand))
        if isinstance(node.op, ast.USub):
            return pc.negate_checked(_widen(self.visit(node.operand)))
        return self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> Column:
        if type(node.op) not in _ARITHMETIC:
            self.generic_visit(node)
        left, right = _widen(self.visit(node.left)), _widen(self.visit(node.right))
        if isinstance(node.op, ast.Div):
            left = pc.cast(left, pa.float64())
        return _ARITHMETIC[type(node.op)](left, right)

    def visit_Compare(self, node: ast.Compare) -> Column:
        result, left = None, node.left
        for operator, right in zip(node.ops, node.comparators, strict=True):
            holds = self._compare(left, operator, right)
            result = holds if result is None else pc.and_kleene(result, holds)
            left = right
        assert result is not None
        return result

    def _compare(self, left: ast.expr, operator: ast.cmpop, right: ast.expr) -> Column:
        if isinstance(operator, ast.In | ast.NotIn):
            holds = self._contains(left, right)
            return pc.invert(holds) if isinstance(operator, ast.NotIn) else holds
        if isinstance(operator, ast.Is | ast.IsNot):
            if not (isinstance(right, ast.Constant) and right.value is None):
                self.generic_visit(right)
            column = self.visit(left)
            is_missing = pc.is_null(column, nan_is_null=pa.types.is_floating(column.type))
            return is_missing if isinstance(operator, ast.Is) else pc.invert(is_missing)
        return _COMPARISONS[type(operator)](self.visit(left), self.visit(right))

    def _contains(self, left: ast.expr, right: ast.expr) -> Column:
        searched = self.visit(left)
        if isinstance(right, ast.List | ast.Tuple | ast.Set):
            values = [self.visit(each) for each in right.elts]
            if not all(isinstance(each, pa.Scalar) for each in values):
                self._refuse(right, "has an element that is a column", "values alone, as in height in [480, 720]")
            holds = pc.is_in(searched, value_set=pa.array([each.as_py() for each in values]))
            return pc.if_else(pc.is_valid(searched), holds, None)
        texts = self.visit(right)
        if isinstance(texts, pa.Scalar):
            self._refuse(right, "is neither a list nor a column", "frames in [10, 20] or 'dog' in captions")
        if not (isinstance(searched, pa.Scalar) and pa.types.is_string(searched.type)):
            self._refuse(left, "is not a text", "a text in quotes, as in 'dog' in captions")
        if pa.types.is_list(texts.type) or pa.types.is_large_list(texts.type):
            texts = pc.binary_join(pc.cast(texts, pa.list_(pa.string())), "\n")  # the kernel takes these lists alone
        return pc.match_substring(texts, searched.as_py())


def _widen(column: Column) -> Column:
    """Return integers with 64 bits, and other values as they are: products of sizes exceed 32 bits."""
    return pc.cast(column, pa.int64()) if pa.types.is_integer(column.type) else column
