"""The text of an expression's parts is what Python itself would write."""

from __future__ import annotations

import ast
from typing import Any

import pytest

from onegraph.capture.expression_text import ExpressionText, last_step
from onegraph.capture.state_check import evaluate


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


@pytest.mark.parametrize(
    ("expression", "parts"),
    [
        ("L['self'].layers._modules['0']", ("L['self'].layers._modules", "['0']")),
        ("_k1.scale", ("_k1", ".scale")),
        ("a[0][12]", ("a[0]", "[12]")),
        ("größe.x", ("größe", ".x")),
        ("name", None),
        ("a + b.c", None),
        ("f(a).b", None),
        ("(a, b.c)", None),
        ("a['it\\'s']", None),
        ("a['x'] if b else c.d", None),
        ("a[-1]", None),
        ("a[1:3]", None),
        ("-a.b", None),
        ("a['b]['c']", None),
        ("1.5", None),
    ],
)
def test_the_last_step_of_a_plain_chain(expression: str, parts: tuple[str, str] | None) -> None:
    assert last_step(expression) == parts
    if parts is not None:
        assert ast.unparse(ast.parse(expression)) == expression
        prefix = ast.parse(expression, mode="eval").body
        assert isinstance(prefix, ast.Attribute | ast.Subscript)
        assert ast.unparse(prefix.value) == parts[0]


class Held:
    """Says how it was asked."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __getattr__(self, name: str) -> Any:
        return Held(f"{self.text}.{name}")

    def __getitem__(self, key: Any) -> Any:
        return Held(f"{self.text}[{key!r}]")


@pytest.mark.parametrize(
    "expression",
    [
        "a",
        "a.b",
        "a['b'].c[0]['1'][12]._d",
        "a[''].c['x y']",
        "a.\u00b5",  # which Python reads as another letter, in its normal form
        "a[-1].b",
        "type(a).__name__",
        "(a, a.b)[1]",
    ],
)
def test_values_are_those_that_python_reads(expression: str) -> None:
    names = {"a": Held("a")}
    now, read = evaluate(expression, names), eval(expression, {**names})  # noqa: S307 - what it is compared with
    assert getattr(now, "text", now) == getattr(read, "text", read)


def test_what_python_does_not_read_has_no_value() -> None:
    with pytest.raises(SyntaxError):
        evaluate("a.class", {"a": Held("a")})
