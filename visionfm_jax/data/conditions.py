"""Conditions on columns, such as `similarity >= 0.28 and NSFW == "UNLIKELY"`, as Arrow expressions.

Python's grammar, little of it: columns by name, numbers, text, True, False; `== != < <= > >=`, chains of them, `in` and
`not in` a tuple or list, `is None`, `is not None`; `and`, `or`, `not`; `+ - * /` in double precision. Nothing is
executed. An empty value satisfies nothing but `is None`; NaN, which pandas writes for empty numbers, counts as empty.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from visionfm_jax.config.rules import shown
from visionfm_jax.errors import ConfigError

_COMPARE: dict[type, Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt,
    ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
}  # fmt: skip
_ARITHMETIC: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}  # fmt: skip


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

    def expression(self, schema: pa.Schema) -> pc.Expression:
        """Over a table with this schema: true, false, or null where an empty value leaves it open.

        Raises:
          ConfigError: the condition has another form than those above.
        """
        return _Translator(schema, self.text).condition(self.tree)


def parse(where: str) -> list[Condition]:
    """The conditions of `where`, all of which have to hold.

    Raises:
      ConfigError: it is empty, or not in the language.
    """
    try:
        tree = ast.parse(where.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise ConfigError(
            f"--where={shown(where)}: {getattr(error, 'msg', error)}; write COLUMN >= NUMBER and …"
        ) from None
    joined = isinstance(tree, ast.BoolOp) and isinstance(tree.op, ast.And)
    conditions = []
    for part in tree.values if isinstance(tree, ast.BoolOp) and joined else [tree]:
        columns = sorted({node.id for node in ast.walk(part) if isinstance(node, ast.Name)})
        condition = Condition(ast.unparse(part), tuple(columns), part)
        condition.expression(pa.schema([]))  # raises what is wrong with it, before anything is read
        if not columns:
            raise ConfigError(f"--where: {condition.text!r} names no column; write COLUMN >= NUMBER")
        conditions.append(condition)
    return conditions


class _Translator:
    """Syntax tree -> expression; columns that the schema lacks are taken for such that need no care."""

    def __init__(self, schema: pa.Schema, text: str):
        self._schema, self._text = schema, text

    def condition(self, node: ast.expr) -> pc.Expression:
        """Something true or false."""
        match node:
            case ast.BoolOp(op, values):
                parts = [self.condition(value) for value in values]
                join = operator.and_ if isinstance(op, ast.And) else operator.or_
                result = parts[0]
                for part in parts[1:]:
                    result = join(result, part)
                return result
            case ast.UnaryOp(ast.Not(), operand):
                return ~self.condition(operand)
            case ast.Compare(left, ops, comparators):
                result = None
                for op, right in zip(ops, comparators, strict=True):
                    part = self._compare(left, op, right)
                    result, left = part if result is None else result & part, right
                assert result is not None
                return result
            case ast.Name():
                return self._value(node) == pc.scalar(True)
        raise self._foreign(node)

    def _compare(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> pc.Expression:
        match op, right:
            case ((ast.In() | ast.NotIn()), (ast.Tuple(values) | ast.List(values))) if values:
                parts = [self._compare(left, ast.Eq(), value) for value in values]
                result = parts[0]
                for part in parts[1:]:
                    result |= part
                return result if isinstance(op, ast.In) else ~result
            case ((ast.Is() | ast.IsNot()), ast.Constant(None)):
                empty = self._value(left).is_null()
                return empty if isinstance(op, ast.Is) else ~empty
        if type(op) not in _COMPARE:
            raise self._foreign(right)
        return _COMPARE[type(op)](self._value(left), self._value(right))

    def _value(self, node: ast.expr) -> pc.Expression:
        match node:
            case ast.Name(name):
                field = pc.field(name)
                if name in self._schema.names and pa.types.is_floating(kind := self._schema.field(name).type):
                    return pc.if_else(pc.is_nan(field), pc.scalar(pa.scalar(None, kind)), field)
                return field
            case ast.Constant(bool() | float() | str() as value):
                return pc.scalar(value)
            case ast.Constant(int(value)) if value < 2**63:
                return pc.scalar(value)
            case ast.UnaryOp(ast.USub(), ast.Constant(int() | float() as value)) if value < 2**63:
                return pc.scalar(-value)
            case ast.BinOp(left, op, right) if type(op) in _ARITHMETIC:
                return _ARITHMETIC[type(op)](self._value(left).cast("float64"), self._value(right).cast("float64"))
        raise self._foreign(node)

    def _foreign(self, node: ast.expr) -> ConfigError:
        return ConfigError(
            f"--where: {ast.unparse(node)!r} in {self._text!r} is not allowed here; use columns, numbers, quoted text "
            "with == != < <= > >= in, and, or, not"
        )
