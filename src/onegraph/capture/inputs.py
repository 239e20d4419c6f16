"""The arguments of a call as leaves with paths, and the declared dynamic dims laid over them.

Takes a bound call and `dynamic_shapes` as in torch.export; gives arguments whose tensors are marked aliases of
the caller's (their contents are never read or changed), and one `Leaf` for each tensor or constant.
"""

from __future__ import annotations

import dataclasses
import inspect
import keyword
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import Dim

from onegraph.capture.dim_specs import child_spec, dim_items, is_static, specs_by_name
from onegraph.capture.regions import UNBACKED, Sizing, predicate_functions
from onegraph.capture.signatures import CallSignature
from onegraph.errors import CaptureError, ConfigError, ShapeOutOfRangeError
from onegraph.ir.dims import DynamicDim
from onegraph.ir.region import canonical_hint

POSITIONAL_ARGUMENTS, KEYWORD_ARGUMENTS = "the positional arguments", "the keyword arguments"
"""The paths of `*args` and `**kwargs` that the written signature doesn't have."""


@dataclass(frozen=True)
class Leaf:
    """One tensor or constant of a call.

    `path` is for people (`caches[0]`), `source` is Dynamo's name (`L['caches'][0]`), `code` is a Python
    expression over the parameters of the traced function. `dims` maps dims of a tensor to declared ones.
    """

    path: str
    source: str
    code: str
    value: Any
    dims: Mapping[int, DynamicDim]
    indexed_source: str = ""
    """Dynamo's other name for a field of a named tuple: by index instead of by name."""


@dataclass(frozen=True)
class Container:
    """A container on the way to the leaves: its type and its length or keys must stay.

    `path`, `source` and `code` are as for a leaf. `twin` is the same object at an earlier place, whose leaves are
    also those of this one.
    """

    path: str
    source: str
    code: str
    kind: type
    keys: tuple[Any, ...] | int
    twin: Container | None = None

    @property
    def is_mutable(self) -> bool:
        return not issubclass(self.kind, tuple)


@dataclass(frozen=True)
class CallInputs:
    """A call ready to be traced. `args` and `kwargs` replace the caller's.

    `given` and `traced` are the caller's arguments and those in their place, by the parameters of the traced function.
    """

    signature: CallSignature
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    given: Mapping[str, Any]
    traced: Mapping[str, Any]
    leaves: tuple[Leaf, ...]
    containers: tuple[Container, ...]
    dims: tuple[DynamicDim, ...]


def read_call(
    signature: CallSignature,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic_shapes: Any,
    max_size: int,
    *,
    sizing: Sizing | None = UNBACKED,
) -> CallInputs:
    """Binds the call and marks its dynamic dims. `max_size` bounds a Dim that was declared without a max.
    With backed sizes the example is replaced by memory of the sample's sizes; with no sizing, nothing is marked.

    Raises ConfigError for arguments that don't fit the signature, or dims that don't fit the arguments.
    """
    bound = _bound(signature.traced, args, kwargs)
    fits = True
    try:
        by_name: Mapping[str, Any] = _bound(signature.written, args, kwargs).arguments
    except ConfigError:
        if not signature.may_differ or signature.traced == signature.written:
            raise
        fits, by_name = False, {**{name: {} for name in signature.written.parameters}, **bound.arguments, **kwargs}
    specs = specs_by_name(dynamic_shapes, signature.written, by_name)
    given = dict(bound.arguments)
    walk = _Walk(max_size, sizing)
    for name, value in _traced_arguments(walk, signature, given, specs, fits):
        bound.arguments[name] = value
    dims = {dim.name: dim for dim in walk.declared()}
    return CallInputs(
        signature=signature,
        args=bound.args,
        kwargs=bound.kwargs,
        given=given,
        traced=dict(bound.arguments),
        leaves=tuple(
            dataclasses.replace(leaf, dims={i: dims[dim.name] for i, dim in leaf.dims.items()}) for leaf in walk.leaves
        ),
        containers=tuple(walk.containers),
        dims=tuple(dims.values()),
    )


def _bound(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> inspect.BoundArguments:
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise ConfigError(f"the call doesn't fit the module: {error}", where=f"forward{signature}") from error
    bound.apply_defaults()
    return bound


def _traced_arguments(
    walk: _Walk,
    signature: CallSignature,
    given: Mapping[str, Any],
    specs: Mapping[str, Any],
    fits: bool,
) -> Iterator[tuple[str, Any]]:
    """The traced function's arguments in place of the caller's; paths and specs are by the names of the written
    signature, which `fits` the call unless a decorator has arguments of its own.
    """
    written = signature.written
    by_kind = {parameter.kind: name for name, parameter in written.parameters.items()}
    more, extra = by_kind.get(_KINDS.VAR_POSITIONAL, ""), by_kind.get(_KINDS.VAR_KEYWORD, "")
    names = [name for name, parameter in written.parameters.items() if parameter.kind in _POSITIONAL]
    if not fits:  # those of the decorator come first, and it may take one of the written ones by name
        names = [name for name in names if name not in signature.traced.parameters]
    position = 0

    def visit(value: Any, name: str, rest: str, key: Any, source: str, code: str) -> Any:
        spec = specs.get(name) if name else child_spec(specs.get(rest), key, rest)
        return walk.visit(value, name or (f"{rest}[{key!r}]" if rest else code), source, code, spec)

    for name, parameter in signature.traced.parameters.items():
        value, source = given[name], f"L[{name!r}]"
        if parameter.kind is _KINDS.VAR_POSITIONAL:
            walk.containers.append(Container(more or POSITIONAL_ARGUMENTS, source, name, tuple, len(value)))
            before = 1 if name == signature.self_in_rest else 0
            yield (
                name,
                tuple(
                    visit(
                        element,
                        names[position + i] if position + i < len(names) else "",
                        more,
                        position + i - len(names),
                        f"{source}[{before + i}]",
                        f"{name}[{i}]",
                    )
                    for i, element in enumerate(value)
                ),
            )
        elif parameter.kind is _KINDS.VAR_KEYWORD:
            walk.containers.append(Container(extra or KEYWORD_ARGUMENTS, source, name, dict, tuple(value)))
            known = written.parameters.keys() - {extra}
            yield (
                name,
                {
                    key: visit(v, key if key in known else "", extra, key, f"{source}[{key!r}]", f"{name}[{key!r}]")
                    for key, v in value.items()
                },
            )
        else:
            by_position = fits and parameter.kind in _POSITIONAL
            shown = names[position] if by_position and position < len(names) else name
            yield name, walk.visit(value, shown, source, name, specs.get(shown))
            position += by_position


_KINDS = inspect.Parameter
_POSITIONAL = (_KINDS.POSITIONAL_ONLY, _KINDS.POSITIONAL_OR_KEYWORD)


class _Walk:
    """One pass over the arguments: rebuilds containers, aliases tensors, collects leaves."""

    def __init__(self, max_size: int, sizing: Sizing | None) -> None:
        self.max_size = max_size
        self.sizing = sizing
        self.leaves: list[Leaf] = []
        self.containers: list[Container] = []
        self.aliases: dict[int, torch.Tensor] = {}
        self.rebuilt: dict[int, tuple[Container, Any]] = {}
        self.dims: dict[str, DynamicDim] = {}
        self.places: dict[str, list[str]] = {}

    def declared(self) -> Iterator[DynamicDim]:
        for name, dim in self.dims.items():
            yield dataclasses.replace(dim, inputs=tuple(self.places[name]))

    def visit(self, value: Any, path: str, source: str, code: str, spec: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self.tensor(value, path, source, code, spec)
        if id(value) in self.rebuilt:
            container, rebuilt = self.rebuilt[id(value)]
            self.containers.append(dataclasses.replace(container, path=path, source=source, code=code, twin=container))
            return rebuilt
        if type(value) is dict:
            items: dict[Any, Any] = {}
            self.add(Container(path, source, code, dict, tuple(value)), value, items)
            for k, v in value.items():
                items[k] = self.visit(
                    v, f"{path}[{k!r}]", f"{source}[{k!r}]", f"{code}[{k!r}]", child_spec(spec, k, path)
                )
            return items
        if type(value) in (list, tuple):
            elements: list[Any] = []
            self.add(Container(path, source, code, type(value), len(value)), value, elements)
            for i, v in enumerate(value):
                child = self.visit(v, f"{path}[{i}]", f"{source}[{i}]", f"{code}[{i}]", child_spec(spec, i, path))
                elements.append(child)
            return elements if type(value) is list else tuple(elements)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return self.named_tuple(value, path, source, code, spec)
        if dataclasses.is_dataclass(value) and not isinstance(value, type | dict):
            return self.dataclass(value, path, source, code, spec)
        if spec is not None and not is_static(spec):
            raise ConfigError(
                f"dynamic_shapes declares a dynamic size for {path}, which is a {type(value).__name__}",
                hint="only tensors have dynamic dims",
            )
        self.leaves.append(Leaf(path, source, code, value, {}))
        return value

    def add(self, container: Container, value: Any, rebuilt: Any) -> None:
        """Notes a container; one that is mutable is rebuilt once, for all the places where it stands."""
        self.containers.append(container)
        if container.is_mutable:
            self.rebuilt[id(value)] = container, rebuilt

    def named_tuple(self, value: Any, path: str, source: str, code: str, spec: Any) -> Any:
        """Fields are visited by name; Dynamo may name them by index."""
        self.containers.append(Container(path, source, code, type(value), len(value)))
        children = []
        for i, field in enumerate(value._fields):
            seen = len(self.leaves)
            field_spec = child_spec(spec, i, path, field)
            children.append(self.visit(value[i], f"{path}.{field}", f"{source}.{field}", f"{code}.{field}", field_spec))
            for index, leaf in enumerate(self.leaves[seen:], seen):
                indexed = leaf.source.replace(f"{source}.{field}", f"{source}[{i}]", 1)
                self.leaves[index] = dataclasses.replace(leaf, indexed_source=indexed)
        return type(value)(*children)

    def dataclass(self, value: Any, path: str, source: str, code: str, spec: Any) -> Any:
        """Fields are visited; the object is copied without its __init__, so that aliases stand in its fields."""
        names = tuple(f.name for f in dataclasses.fields(value))
        copied = object.__new__(type(value))
        self.add(Container(path, source, code, type(value), -1), value, copied)
        if hasattr(value, "__dict__"):
            copied.__dict__.update(value.__dict__)
        for name in names:
            child = self.visit(
                getattr(value, name),
                f"{path}.{name}",
                f"{source}.{name}",
                f"{code}.{name}",
                child_spec(spec, name, path),
            )
            object.__setattr__(copied, name, child)
        return copied

    def tensor(self, value: torch.Tensor, path: str, source: str, code: str, spec: Any) -> torch.Tensor:
        if value.is_nested and value.layout == torch.strided:  # has no shape
            raise CaptureError(
                f"{path} is a nested tensor, which can't be traced",
                where=f"argument {path}",
                hint="pass it with layout=torch.jagged, or padded: torch.nested.to_padded_tensor",
            )
        declared = self.tensor_dims(value, path, spec)
        alias = self.aliases.get(id(value))
        is_new = alias is None
        if alias is None:
            alias = _canonical_alias(value) if type(value) in (torch.Tensor, torch.nn.Parameter) else value
            self.aliases[id(value)] = alias
        if declared and alias is value:
            raise ConfigError(
                f"{path} is a {type(value).__name__}; dynamic dims need a plain torch.Tensor",
                hint="pass its plain tensor, or leave its sizes static",
            )
        for index, dim in declared.items():
            size = value.shape[index]
            if not dim.min <= size <= dim.max:
                raise out_of_range(dim, path, index, size)
        if declared and self.sizing is not None and self.sizing.mode == "unbacked":
            from onegraph.torch_compat import dynamo  # takes seconds to import

            for index, dim in declared.items():
                dynamo.mark_dynamic_dim(
                    alias, index, name=dim.name, minimum=dim.min, maximum=dim.max, hint=canonical_hint(dim)
                )
        elif declared and is_new and self.sizing is not None:
            alias = self.aliases[id(value)] = self.sample(value, path, declared, self.sizing)
        self.leaves.append(Leaf(path, source, code, value, declared))
        return alias

    def sample(
        self, value: torch.Tensor, path: str, declared: Mapping[int, DynamicDim], sizing: Sizing
    ) -> torch.Tensor:
        """Memory of the sample's sizes, with the layout of `value`; sizes 0 and 1 are static, as torch has them."""
        if not value.is_contiguous():
            raise ConfigError(
                f"{path} isn't contiguous, and its sizes are traced at samples of the range",
                where=f"argument {path}",
                hint="pass it contiguous, or leave out dynamic_shapes and on_constraint of the config",
            )
        order = list(self.dims)
        shape = list(value.shape)
        for index, dim in declared.items():
            shape[index] = sizing.size(dim, order.index(dim.name))
        from onegraph.torch_compat import dynamo

        sample = torch.empty(shape, dtype=value.dtype, device=value.device)
        for index, dim in declared.items():
            if shape[index] > 1:
                dynamo.mark_backed_dim(sample, index, minimum=max(dim.min, 2), maximum=dim.max)
        return sample

    def tensor_dims(self, value: torch.Tensor, path: str, spec: Any) -> dict[int, DynamicDim]:
        declared: dict[int, DynamicDim] = {}
        for index, item in dim_items(spec, path):
            if index >= value.dim() or index < 0:
                raise ConfigError(f"dynamic_shapes names dim {index} of {path}, which has {value.dim()} dims")
            dim = self.dim(item, path, index)
            if dim is not None:
                declared[index] = dim
                self.places.setdefault(dim.name, []).append(f"{path}[{index}]")
        return declared

    def dim(self, item: Any, path: str, index: int) -> DynamicDim | None:
        where = f"dynamic_shapes, {path} dim {index}"
        if item is None or item is Dim.STATIC or isinstance(item, int):
            return None
        if item is Dim.AUTO or item is Dim.DYNAMIC:
            return self.remember(DynamicDim(f"{path}[{index}]", 0, self.max_size), where)
        if type(item).__name__ in ("_DerivedDim", "DerivedDim"):
            raise ConfigError(
                f"{item.__name__} is derived from another dim",
                where=where,
                hint="declare it as a Dim of its own with a range",
            )
        if not isinstance(item, Dim):
            raise ConfigError(
                f"{item!r} is no Dim", where=where, hint='write Dim("name", min=1, max=N) from torch.export'
            )
        if keyword.iskeyword(item.__name__) or _is_function(item.__name__):
            raise ConfigError(
                f"a Dim is named {item.__name__!r}, which means something else in conditions on sizes",
                where=where,
                hint="give it another name",
            )
        maximum = item.max if isinstance(item.max, int) and item.max < 2**62 else self.max_size
        return self.remember(DynamicDim(item.__name__, int(item.min), int(maximum)), where)

    def remember(self, dim: DynamicDim, where: str) -> DynamicDim:
        known = self.dims.setdefault(dim.name, dim)
        if (known.min, known.max) != (dim.min, dim.max):
            raise ConfigError(
                f"{dim.name} is declared as {known.min}..{known.max} and as {dim.min}..{dim.max}",
                where=where,
                hint="one name is one size: use the same Dim, or another name",
            )
        return known


def _is_function(name: str) -> bool:
    """Whether a name means a function in conditions on sizes: all of these begin with a capital."""
    return name[:1].isupper() and name in predicate_functions()


def _canonical_alias(value: torch.Tensor) -> torch.Tensor:
    """Another Python object over the same memory, so that marks don't stay on the caller's tensor.

    A contiguous tensor with a dim of size 1 may carry any stride there; the alias has the canonical one.
    """
    alias = value.detach()
    if alias.layout == torch.strided and alias.is_contiguous() and alias.stride() != _contiguous(alias.shape):
        alias = alias.as_strided(alias.shape, _contiguous(alias.shape), alias.storage_offset())
    return alias


def _contiguous(shape: torch.Size) -> tuple[int, ...]:
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def out_of_range(dim: DynamicDim, path: str, index: int, size: int) -> ShapeOutOfRangeError:
    """The error for a size that its declared range doesn't have."""
    return ShapeOutOfRangeError(
        f"{path} has size {size} at dim {index}, outside the declared range {dim.name} = {dim.min}..{dim.max}",
        where=f"argument {path}",
        hint=f'declare it wider, such as Dim("{dim.name}", min={min(dim.min, size)}, max={max(dim.max, size)})',
    )
