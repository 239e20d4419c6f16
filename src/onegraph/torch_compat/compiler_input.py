"""What Inductor is handed, written down a second time, for the audit of keys.

Shares no code with what makes keys (`graph_text`, `portable_config`, `compile_state`), so that what is forgotten there
is seen here. Takes a graph with its fake inputs, or the options of a compile; gives text, which means something in this
process alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch._functorch.config
import torch._inductor.config
from torch.fx.node import map_aggregate

_SYMBOL = re.compile(r"\b(?:u|s|zuf|zf)\d+\b")


def written_graph(graph_module: torch.fx.GraphModule, fake_inputs: tuple[Any, ...], shape_env: Any) -> str:
    """A line for each node, and for each symbol what is known of it. Symbols are numbered as they come."""
    lines = [*_inputs(fake_inputs), *_nodes(graph_module, "")]
    names: dict[str, str] = {}

    def numbered(text: str) -> str:
        return _SYMBOL.sub(lambda found: names.setdefault(found[0], f"size{len(names)}"), text)

    lines = list(map(numbered, lines))
    known = {str(symbol): f"in {bounds}" for symbol, bounds in shape_env.var_to_range.items()}
    for about in ("backed_var_to_val", "var_to_hint_override"):
        for symbol, value in getattr(shape_env, about, {}).items():
            known[str(symbol)] = f"{known.get(str(symbol), '')} {about} {value}"
    lines += [f"{names[name]} {known.get(name, '')}" for name in list(names)]
    asserted = [one.expr for several in shape_env.deferred_runtime_asserts.values() for one in several]
    for expression in (*asserted, *(guard.expr for guard in shape_env.guards)):
        if set(map(str, expression.free_symbols)) <= names.keys():
            lines.append(f"known: {numbered(str(expression))}")
    return "\n".join(lines)


def _inputs(fake_inputs: tuple[Any, ...]) -> Iterator[str]:
    storages: dict[int, int] = {}
    for number, value in enumerate(fake_inputs):
        place = ""
        if isinstance(value, torch.Tensor) and value.layout == torch.strided:
            storage = storages.setdefault(value.untyped_storage()._cdata, number)
            place = f" from {value.storage_offset()} of the memory of {storage}, {value.requires_grad}"
        yield f"input {number}: {_shown(value)}{place}"


def _nodes(graph_module: torch.fx.GraphModule, indent: str) -> Iterator[str]:
    places: dict[torch.fx.Node, _Place] = {}
    for number, node in enumerate(graph_module.graph.nodes):
        places[node] = _Place(number)
        if node.op == "placeholder":
            continue
        given = map_aggregate((node.args, node.kwargs), lambda one: _argument(one, places))
        value = node.meta.get("example_value", node.meta.get("val"))
        target = _target(node) if node.op.startswith("call_") else ""
        yield f"{indent}{number}: {node.op} {target} {given} -> {_shown(value)} {node.meta.get('custom', '')}"
        if node.op == "get_attr":
            held = getattr(graph_module, str(node.target))
            if isinstance(held, torch.fx.GraphModule):
                yield from _nodes(held, f"{indent}  ")
            else:
                yield f"{indent}  {_shown(held)} {_contents(held)}"


class _Place:
    """A node as it is shown in arguments."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __repr__(self) -> str:
        return f"%{self.number}"


def _argument(value: Any, places: Mapping[torch.fx.Node, _Place]) -> Any:
    if isinstance(value, torch.fx.Node):
        return places[value]
    return f"{_shown(value)} {_contents(value)}" if isinstance(value, torch.Tensor) else value


def _target(node: torch.fx.Node) -> str:
    if isinstance(node.target, str):
        return node.target
    schema = getattr(node.target, "_schema", "")
    return f"{getattr(node.target, '__module__', '')}.{getattr(node.target, '__qualname__', '')} {node.target} {schema}"


def _shown(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_shown, value))})"
    if not isinstance(value, torch.Tensor):
        return f"{type(value).__name__} {value}" if isinstance(value, int | float | torch.SymInt) else str(type(value))
    strides = tuple(value.stride()) if value.layout == torch.strided else value.layout
    return f"{value.dtype} {tuple(value.shape)} {strides} {value.device}"


def _contents(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return repr(value)
    raw = value.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(bytes(raw.tolist())).hexdigest()


def written_settings(options: Mapping[str, Any], device_type: str) -> dict[str, str]:
    """All settings that the compiler reads, by name: its own but for those of no matter to torch, and torch's."""
    found: dict[str, str] = {}
    for title, config in (("inductor", torch._inductor.config), ("functorch", torch._functorch.config)):
        ignored = tuple(getattr(config, "_cache_config_ignore_prefix", ()))
        for name, value in config.get_config_copy().items():  # type: ignore[attr-defined]
            if not name.startswith(ignored) and not name.startswith("_save_config"):
                found[f"{title}.{name}"] = repr(value)
    found |= {f"inductor.{name}": repr(value) for name, value in options.items()}
    return found | {
        "default dtype": str(torch.get_default_dtype()),
        "matmul precision": torch.get_float32_matmul_precision(),
        "deterministic": str(torch.are_deterministic_algorithms_enabled()),
        "fills memory": str(torch.utils.deterministic.fill_uninitialized_memory),
        "threads": str(torch.get_num_threads()),
        "mkldnn": str(torch._C._get_mkldnn_enabled()),
        "autocast": f"{torch.is_autocast_enabled(device_type)} {torch.get_autocast_dtype(device_type)}",
        "build": torch.__config__.show(),
    }


def switches() -> dict[str, bool]:
    """Inductor's options that are true or false."""
    return {name: value for name, value in torch._inductor.config.get_config_copy().items() if type(value) is bool}


def switched(name: str, value: bool) -> contextlib.AbstractContextManager[None]:
    """Inductor's option is this in the whole process, while it lasts."""
    found: contextlib.AbstractContextManager[None] = torch._inductor.config.patch({name: value})
    return found
