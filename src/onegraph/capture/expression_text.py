"""The text of parsed expressions and of their parts, each made once: a large model has thousands, many levels deep."""

from __future__ import annotations

import ast

_PLAIN = ast.Name | ast.Attribute | ast.Subscript | ast.Call


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
