"""The text of expressions and of their parts, each made once: a large model has thousands, many levels deep."""

from __future__ import annotations

import ast
import functools
import keyword
import re

_PLAIN = ast.Name | ast.Attribute | ast.Subscript | ast.Call
_STEP = r"\.[^\W\d]\w*|\['[^'\\\]]*'\]|\[\d+\]"
_CHAIN = re.compile(rf"([^\W\d]\w*(?:{_STEP})*)({_STEP})")
_STEPS = re.compile(r"\.(?P<attribute>[^\W\d]\w*)|\['(?P<key>[^'\\\]]*)'\]|\[(?P<index>\d+)\]")


def last_step(expression: str) -> tuple[str, str] | None:
    """`a.b['c'].d` as `a.b['c']` and `.d`, without parsing: for plain chains of a name, attributes and constant keys.

    None for any other expression. Each prefix of a chain is a chain, or a name.
    """
    chain = _CHAIN.fullmatch(expression)
    return None if chain is None else (chain[1], chain[2])


@functools.lru_cache(maxsize=64)
def chain(expression: str) -> tuple[str, tuple[tuple[bool, str | int], ...]] | None:
    """`a.b['c']` as `a` and its steps: whether it is an attribute, and its name or key.

    None as for `last_step`, and for what Python doesn't read: `a.class`.
    """
    if not expression.isascii() or _CHAIN.fullmatch(expression) is None:  # Python has a normal form of other names
        return None
    name = re.match(r"\w+", expression)
    assert name is not None
    steps = [one.group("attribute", "key", "index") for one in _STEPS.finditer(expression, name.end())]
    if any(keyword.iskeyword(attribute or "") for attribute, _, _ in steps):
        return None
    return name[0], tuple(_step(*one) for one in steps)


def _step(attribute: str | None, key: str | None, index: str | None) -> tuple[bool, str | int]:
    if attribute is not None:
        return True, attribute
    return False, int(index) if index is not None else str(key)


class ExpressionText:
    """`text(node)` is `ast.unparse(node)`, in time that doesn't grow with the depth of parts that are known already.

    The nodes must not change between two questions about them.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[ast.AST, str]] = {}  # with the node, so that no other one gets its id

    def __call__(self, node: ast.AST) -> str:
        """The node's source text."""
        known = self._known.get(id(node))
        if known is None:
            known = self._known[id(node)] = node, self._text(node)
        return known[1]

    def _text(self, node: ast.AST) -> str:
        if isinstance(node, ast.Name):
            return node.id
        if isinstance(node, ast.Constant) and type(node.value) in (str, int):
            return repr(node.value)
        if isinstance(node, ast.Attribute) and isinstance(node.value, _PLAIN):
            return f"{self(node.value)}.{node.attr}"
        if isinstance(node, ast.Subscript) and isinstance(node.value, _PLAIN) and isinstance(node.slice, ast.Constant):
            return f"{self(node.value)}[{self(node.slice)}]"
        if isinstance(node, ast.Call) and isinstance(node.func, _PLAIN) and not node.keywords:
            return f"{self(node.func)}({', '.join(map(self, node.args))})"
        return ast.unparse(node)
