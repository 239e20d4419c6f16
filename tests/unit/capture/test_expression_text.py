"""The text of an expression's parts is what Python itself would write."""

from __future__ import annotations

import ast

import pytest

from onegraph.capture.expression_text import ExpressionText


@pytest.mark.parametrize(
    "expression",
    [
        "L['self'].layers._modules['0'].weight",
        "dict(L['self'].__dict__)['it\\'s']",
        "G['TABLE'][-1][2][1:3][(1, 'a')]",
        "type(L['x']).__mro__[1](*L['args'], key=3)",
        "f(a, 1, 'x', None, 2.5, b + 1, *c).d",
        "(1).real + [1, 2][0]",
        "(lambda x: x)(a)[b.c]",
    ],
)
def test_every_part_reads_as_python_writes_it(expression: str) -> None:
    tree = ast.parse(expression, mode="eval").body
    text = ExpressionText()
    parts = [part for part in ast.walk(tree) if isinstance(part, ast.expr)]
    assert [text(part) for part in parts] == [ast.unparse(part) for part in parts]
