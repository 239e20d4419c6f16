"""The declared `dynamic_shapes`, laid beside the arguments: which spec is whose.

Takes them as in torch.export: by argument name or in order, nested as the arguments are.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch.export import Dim

from onegraph.errors import ConfigError, nearest


def specs_by_name(dynamic_shapes: Any, signature: inspect.Signature, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The spec of each parameter; names under a **kwargs parameter may stand at the top, as in torch.export."""
    if dynamic_shapes is None:
        return {}
    names = list(arguments)
    if isinstance(dynamic_shapes, tuple | list):
        if len(dynamic_shapes) > len(names):
            raise ConfigError(
                f"dynamic_shapes has {len(dynamic_shapes)} entries for {len(names)} arguments",
                where=f"forward{signature}",
            )
        return dict(zip(names, dynamic_shapes, strict=False))
    if not isinstance(dynamic_shapes, Mapping):
        raise ConfigError(
            f"dynamic_shapes is a {type(dynamic_shapes).__name__}, not a dict by argument name",
            hint='for example dynamic_shapes={"x": {0: Dim("num_tokens", min=1, max=8192)}}',
        )
    specs = {}
    extra = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), None)
    for name, spec in dynamic_shapes.items():
        if name in arguments:
            specs[name] = spec
        elif extra is not None and name in arguments.get(extra, {}):
            specs.setdefault(extra, {})[name] = spec
        elif name not in signature.parameters and extra is None:
            raise ConfigError(
                f"dynamic_shapes names {name!r}, which is no argument of the module",
                where=f"forward{signature}",
                hint=nearest(str(name), names),
            )
    return specs


def child_spec(spec: Any, key: Any, path: str, name: str | None = None) -> Any:
    """The spec of one child of a container: by key or index, by field name, or none."""
    if spec is None or is_static(spec):
        return None
    if isinstance(spec, Mapping):
        return spec.get(key, spec.get(name) if name is not None else None)
    if isinstance(spec, tuple | list) and isinstance(key, int):
        if key >= len(spec):
            raise ConfigError(f"dynamic_shapes has {len(spec)} entries for {path}, which has more")
        return spec[key]
    raise ConfigError(
        f"dynamic_shapes gives {spec!r} for {path}, which is a container",
        hint="nest it as the argument is nested",
    )


def is_static(spec: Any) -> bool:
    return spec is Dim.STATIC or spec == {} or spec == () or spec == []


def dim_items(spec: Any, path: str) -> list[tuple[int, Any]]:
    if spec is None or spec is Dim.STATIC:
        return []
    if isinstance(spec, Mapping):
        wrong = [key for key in spec if not isinstance(key, int)]
        if wrong:
            raise ConfigError(
                f"dynamic_shapes gives {wrong[0]!r} for {path}", hint="a tensor's dims are numbered 0, 1, …"
            )
        return list(spec.items())
    if isinstance(spec, tuple | list):
        return list(enumerate(spec))
    raise ConfigError(
        f"dynamic_shapes gives {spec!r} for the tensor {path}",
        hint='write {0: Dim("num_tokens", min=1, max=8192)}',
    )
