"""A captured graph as canonical text: equal text means that a compiler is handed the same thing.

Names of nodes and symbols are replaced by their order; operations, arguments, and each value's dtype, sizes,
strides and device stay. Weights and inputs are placeholders, so that their contents don't count.
"""

from __future__ import annotations

import enum
import hashlib
import types
from typing import Any

import sympy
import torch

from onegraph.ir.key import Unkeyable
from onegraph.torch_compat import shapes, torch_state
from onegraph.torch_compat.operators import HigherOrderOperator, OpOverload, OpOverloadPacket


class _NoIdentityError(Exception):
    """Raised inside for an object of which nobody could say whether it is the same in another process."""


def graph_text(graph_module: torch.fx.GraphModule, shape_env: Any) -> str | Unkeyable:
    """The canonical text of a graph with its nested graphs, or why it has none."""
    try:
        return _Writer(shape_env).graph(graph_module)
    except _NoIdentityError as error:
        return Unkeyable(str(error))


class _Writer:
    def __init__(self, shape_env: Any) -> None:
        self.shape_env = shape_env
        self.symbols: dict[str, str] = {}
        self.expressions: dict[Any, str] = {}
        self.storages: dict[int, tuple[int, torch.Tensor]] = {}

    def graph(self, graph_module: torch.fx.GraphModule) -> str:
        numbers: dict[torch.fx.Node, int] = {}
        lines = []
        for number, node in enumerate(graph_module.graph.nodes):
            numbers[node] = number
            target = "" if node.op in ("placeholder", "output") else self.target(graph_module, node)
            arguments = "" if node.op == "placeholder" else self.value((node.args, node.kwargs), numbers)
            example = node.meta.get("example_value", node.meta.get("val"))
            shared = self.shared_storage(example, number) if node.op == "placeholder" else ""
            lines.append(f"%{number} = {node.op} {target}{arguments} : {self.meta(example)}{shared}")
        symbols = [
            f"{new} in [{r.lower}, {r.upper}]{'' if self.hint(old) is None else f' hint {self.hint(old)}'}"
            for old, new in self.symbols.items()
            if (r := self.range(old)) is not None
        ]
        return "\n".join(lines + symbols)

    def shared_storage(self, value: Any, number: int) -> str:
        """Which earlier input has its memory in the same storage: what is changed in one is seen in the other."""
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
            return ""
        first, base = self.storages.setdefault(value.untyped_storage()._cdata, (number, value))
        if first == number:
            return ""
        offsets = (self.expression(shapes.expression(t.storage_offset(), self.shape_env)) for t in (base, value))
        return f" shares %{first}: " + " -> ".join(offsets)

    def target(self, graph_module: torch.fx.GraphModule, node: torch.fx.Node) -> str:
        if node.op == "call_method":
            return f".{node.target}"
        if node.op == "get_attr":
            value = getattr(graph_module, str(node.target))
            if isinstance(value, torch.fx.GraphModule):
                return "{" + self.graph(value) + "}"
            return self.object(value)
        if node.op == "call_module":
            raise _NoIdentityError(f"the graph calls the module {node.target}, which isn't traced")
        return self.object(node.target)

    def value(self, value: Any, numbers: dict[torch.fx.Node, int]) -> str:
        if isinstance(value, torch.fx.Node):
            return f"%{numbers[value]}"
        if isinstance(value, tuple | list):
            return f"{type(value).__name__}({', '.join(self.value(v, numbers) for v in value)})"
        if isinstance(value, dict):
            return "{" + ", ".join(f"{k!r}: {self.value(v, numbers)}" for k, v in value.items()) + "}"
        if isinstance(value, slice):
            return f"slice{self.value((value.start, value.stop, value.step), numbers)}"
        return self.object(value)

    def object(self, value: Any) -> str:
        if value is None or isinstance(value, bool | int | float | complex | str | bytes):
            return f"{type(value).__name__}:{value!r}"
        if shapes.is_symbolic(value):
            return self.expression(value.node.expr)
        if isinstance(value, torch.dtype | torch.device | torch.layout | torch.memory_format | type(Ellipsis)):
            return str(value)
        if isinstance(value, OpOverload):
            if value.namespace not in ("aten", "prims") and torch_state.is_composite(value):
                raise _NoIdentityError(f"the compiler takes {value} apart by its Python code, which isn't digested")
            return f"{value}|{value._schema}|{sorted(str(tag) for tag in value.tags)}"
        if isinstance(value, OpOverloadPacket):
            return f"{value}[{', '.join(self.object(getattr(value, name)) for name in value.overloads())}]"
        if isinstance(value, HigherOrderOperator):
            return str(value)
        if isinstance(value, enum.Enum):
            return f"{type(value).__module__}.{type(value).__qualname__}.{value.name}"
        if isinstance(value, torch.Tensor):
            data = value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
            return f"{self.meta(value)}={hashlib.sha256(data).hexdigest()}"
        if isinstance(value, types.FunctionType | types.BuiltinFunctionType | types.MethodDescriptorType | type):
            return self.function(value)
        raise _NoIdentityError(
            f"the graph holds a {type(value).__module__}.{type(value).__qualname__}, without a stable identity"
        )

    def function(self, value: Any) -> str:
        module, name = getattr(value, "__module__", None) or "builtins", value.__qualname__
        if module.split(".")[0] in ("torch", "math", "operator", "_operator", "builtins"):
            return f"{module}.{name}"
        raise _NoIdentityError(f"the graph calls {module}.{name}, and what it calls in turn can't be digested")

    def meta(self, value: Any) -> str:
        if isinstance(value, torch.Tensor):
            if value.layout != torch.strided:
                return f"{value.dtype}[{value.layout}]{tuple(value.shape)}"
            size = ",".join(self.expression(shapes.expression(s, self.shape_env)) for s in value.shape)
            stride = ",".join(self.expression(shapes.expression(s, self.shape_env)) for s in value.stride())
            return f"{value.dtype}[{size}]({stride})@{value.device}"
        if shapes.is_symbolic(value):
            return self.expression(value.node.expr)
        if isinstance(value, tuple | list):
            return "(" + ",".join(self.meta(v) for v in value) + ")"
        return "" if value is None else f"{type(value).__name__}"

    def expression(self, expr: Any) -> str:
        text = self.expressions.get(expr)
        if text is None:
            replaced = self.shape_env.replace(expr) if self.shape_env is not None else expr
            new = {}
            for symbol in sorted(getattr(replaced, "free_symbols", ()), key=str):
                name = self.symbols.setdefault(str(symbol), f"d{len(self.symbols)}")
                new[symbol] = sympy.Symbol(name, integer=True)
            text = str(replaced.xreplace(new)) if new else str(replaced)
            self.expressions[expr] = text
        return text

    def range(self, name: str) -> Any:
        for symbol, value_range in self.shape_env.var_to_range.items():
            if str(symbol) == name:
                return value_range
        return None

    def hint(self, name: str) -> Any:
        for symbol, value in getattr(self.shape_env, "backed_var_to_val", {}).items():
            if str(symbol) == name:
                return value
        return None
