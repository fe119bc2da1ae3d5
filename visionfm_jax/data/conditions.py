"""Conditions on columns, such as `similarity >= 0.28 and NSFW == "UNLIKELY"`, evaluated by Arrow.

Python's grammar, little of it: columns by name, numbers, text, True, False; `== != < <= > >=`, chains of them, `in` and
`not in` a tuple or list, `is None`, `is not None`; `and`, `or`, `not`; `+ - * /` in double precision. Nothing is
executed. An empty value satisfies nothing but `is None`; NaN, which pandas writes for empty numbers, counts as empty,
and so does what is divided by zero.

A number that is written down is rounded to the precision of a column of float32 or float16 before the two are compared:
a similarity stored as the float32 next to 0.29 fulfils `similarity >= 0.29`. Whole numbers are compared exactly with
numbers that are written down; columns of different kinds in double precision.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from visionfm_jax.config.rules import shown
from visionfm_jax.errors import ConfigError, one_line

_Value = pa.ChunkedArray | pa.Scalar  # a column, or what is the same for all rows

_COMPARE: dict[type, Callable[[_Value, _Value], _Value]] = {
    ast.Eq: pc.equal, ast.NotEq: pc.not_equal, ast.Lt: pc.less,
    ast.LtE: pc.less_equal, ast.Gt: pc.greater, ast.GtE: pc.greater_equal,
}  # fmt: skip
_ARITHMETIC: dict[type, Callable[[_Value, _Value], _Value]] = {
    ast.Add: pc.add, ast.Sub: pc.subtract, ast.Mult: pc.multiply, ast.Div: pc.divide,
}  # fmt: skip
_DEEPEST = 64  # levels of a syntax tree: Python's own functions for trees recurse


@dataclass(frozen=True)
class Condition:
    """One of the conditions that `and` joins.

    Attributes:
      text: as it was written.
      columns: that it names, sorted.
    """

    text: str
    columns: tuple[str, ...]
    tree: ast.expr

    def evaluate(self, table: pa.Table) -> pa.ChunkedArray:
        """Of each row: true, false, or null where an empty value leaves it open.

        Raises:
          pa.ArrowException: it does not fit the types of its columns.
        """
        return _condition(table, self.tree)


def parse(where: str) -> list[Condition]:
    """The conditions of `where`, all of which have to hold.

    Raises:
      ConfigError: it is empty, or not in the language.
    """
    try:
        tree = ast.parse(where.strip(), mode="eval").body
    except (MemoryError, RecursionError):
        raise _too_deep(where) from None
    except (SyntaxError, ValueError) as error:
        problem = getattr(error, "msg", str(error))
        if "set_int_max_str_digits" in problem:
            problem = "a number has thousands of digits"
        raise ConfigError(f"--where={shown(where)}: {problem}; write COLUMN >= NUMBER and …") from None
    level: list[ast.AST] = [tree]
    for _ in range(_DEEPEST):
        level = [child for node in level for child in ast.iter_child_nodes(node)]
    if level:
        raise _too_deep(where)
    parts = tree.values if isinstance(tree, ast.BoolOp) and isinstance(tree.op, ast.And) else [tree]
    return [_parsed(part) for part in parts]


def _too_deep(where: str) -> ConfigError:
    return ConfigError(f"--where={shown(where)}: is nested too deeply; write COLUMN >= NUMBER and …")


def _parsed(tree: ast.expr) -> Condition:
    """With what is wrong with it found before anything is read."""
    columns = sorted({node.id for node in ast.walk(tree) if isinstance(node, ast.Name)})
    try:
        _condition(pa.table({name: pa.nulls(0) for name in columns}), tree)
    except pa.ArrowException as error:
        raise ConfigError(
            f"--where: {_written(tree)} cannot be evaluated ({one_line(error)}); compare numbers with numbers and text "
            "with text"
        ) from error
    if not columns:
        raise ConfigError(f"--where: {_written(tree)} names no column; write COLUMN >= NUMBER")
    return Condition(ast.unparse(tree), tuple(columns), tree)


def _condition(table: pa.Table, node: ast.expr) -> _Value:
    """Something true or false."""
    match node:
        case ast.BoolOp(op, values):
            join = pc.and_kleene if isinstance(op, ast.And) else pc.or_kleene
            result = _condition(table, values[0])
            for value in values[1:]:
                result = join(result, _condition(table, value))
            return result
        case ast.UnaryOp(ast.Not(), operand):
            return pc.invert(_condition(table, operand))
        case ast.Compare(left, ops, comparators):
            result = pa.scalar(True)
            for op, right in zip(ops, comparators, strict=True):
                result, left = pc.and_kleene(result, _compare(table, left, op, right)), right
            return result
        case ast.Name():
            return pc.equal(_value(table, node), pa.scalar(True))
    raise _foreign(node)


def _compare(table: pa.Table, left: ast.expr, op: ast.cmpop, right: ast.expr) -> _Value:
    match op, right:
        case ((ast.In() | ast.NotIn()), (ast.Tuple(values) | ast.List(values))) if values:
            result = _among(_value(table, left), [_value(table, value) for value in values])
            return result if isinstance(op, ast.In) else pc.invert(result)
        case (ast.Is(), ast.Constant(None)):
            return pc.is_null(_value(table, left))
        case (ast.IsNot(), ast.Constant(None)):
            return pc.is_valid(_value(table, left))
    if type(op) not in _COMPARE:
        raise _foreign(right)
    return _COMPARE[type(op)](*_alike(_value(table, left), _value(table, right)))


def _among(value: _Value, others: list[_Value]) -> _Value:
    """Whether a value equals one of the others; thousands of texts or whole numbers are looked up in one go."""
    for fits in (_is_text, pa.types.is_signed_integer):
        if fits(value.type) and all(isinstance(other, pa.Scalar) and fits(other.type) for other in others):
            kind = value.type if fits is _is_text else pa.int64()
            there = pc.is_in(pc.cast(value, kind), value_set=pa.array([other.as_py() for other in others], kind))
            return pc.if_else(pc.is_null(value), pa.scalar(None, pa.bool_()), there)
    result = pa.scalar(False)
    for other in others:
        result = pc.or_kleene(result, pc.equal(*_alike(value, other)))
    return result


def _alike(a: _Value, b: _Value) -> tuple[_Value, _Value]:
    """Two values as Arrow compares them as the head of this file says."""
    if pa.types.is_null(a.type) and pa.types.is_null(b.type):  # which it does not compare
        return pc.cast(a, pa.bool_()), pc.cast(b, pa.bool_())
    if not (_is_number(a.type) and _is_number(b.type)):
        return a, b
    a, b = _rounded(a, b.type), _rounded(b, a.type)
    unsigned = {a.type, b.type} != {pa.uint64()} and pa.uint64() in (a.type, b.type)
    if pa.types.is_floating(a.type) or pa.types.is_floating(b.type) or unsigned:
        return _double(a), _double(b)
    return a, b


def _rounded(value: _Value, kind: pa.DataType) -> _Value:
    """A number that is written down, as one of the kind of the column that it is compared with, if it can be."""
    if not isinstance(value, pa.Scalar) or not value.is_valid:
        return value
    number = value.as_py()
    if pa.types.is_floating(kind):
        precision = np.dtype(kind.to_pandas_dtype())
        largest = float(np.finfo(precision).max)
        return pa.scalar(float(precision.type(number))) if abs(number) <= largest else value
    low, high = (0, 2**64) if kind == pa.uint64() else (-(2**63), 2**63)
    if low <= number < high and number == int(number):
        return pa.scalar(int(number), pa.uint64() if kind == pa.uint64() else pa.int64())
    return value


def _value(table: pa.Table, node: ast.expr) -> _Value:
    match node:
        case ast.Name(name):
            column = table[name]
            if pa.types.is_dictionary(column.type):
                column = pc.cast(column, column.type.value_type)
            return _without_nan(column)
        case ast.Constant(bool() | float() as value):
            return pa.scalar(value)
        case ast.Constant(str(value)) if value == value.encode(errors="replace").decode():
            return pa.scalar(value)  # and not half a character, which Arrow refuses
        case ast.Constant(int(value)) if value < 2**63:
            return pa.scalar(value)
        case ast.UnaryOp(ast.USub(), ast.Constant(int() | float() as value)) if value < 2**63:
            return pa.scalar(-value)
        case ast.BinOp(left, op, right) if type(op) in _ARITHMETIC:
            a, b = _double(_value(table, left)), _double(_value(table, right))
            if isinstance(op, ast.Div):
                b = pc.if_else(pc.equal(b, 0.0), pa.scalar(None, b.type), b)
            return _without_nan(_ARITHMETIC[type(op)](a, b))
    raise _foreign(node)


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _double(value: _Value) -> _Value:
    return pc.cast(value, pa.float64(), safe=False)


def _without_nan(value: _Value) -> _Value:
    if not pa.types.is_floating(value.type):
        return value
    return pc.if_else(pc.is_nan(value), pa.scalar(None, value.type), value)


def _foreign(node: ast.expr) -> ConfigError:
    return ConfigError(
        f"--where: {_written(node)} is not allowed here; use columns, numbers, quoted text with == != < <= > >= in, "
        "and, or, not"
    )


def _written(node: ast.expr) -> str:
    """A part of a condition, for people."""
    try:
        return shown(ast.unparse(node))
    except ValueError:  # Python writes no number of thousands of digits
        return "a number of thousands of digits"
