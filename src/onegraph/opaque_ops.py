"""`onegraph.opaque`: a Python function as a torch op that Dynamo doesn't trace into, with its fake.

Takes a function with annotations; gives a function that calls the op. What the function decides by looking at
sizes or values stays inside the op. The op's name holds a digest of the function's code, so that equal names
mean equal code in every process; torch keeps ops for the life of the process.
"""

from __future__ import annotations

import functools
import hashlib
import re
import threading
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar, overload

import torch

from onegraph.errors import CustomOpError
from onegraph.ops.memory import share_memory
from onegraph.torch_compat import fake_runs

Function = TypeVar("Function", bound=Callable[..., Any])

LIBRARY = torch.library.Library("onegraph_opaque", "FRAGMENT")
_REGISTERED: dict[str, tuple[types.FunctionType | None, ...]] = {}
"""What stands behind each name in LIBRARY, which torch itself doesn't tell."""
_REGISTERING = threading.Lock()
_FURTHEST = 1 << 16
"""How far above the least size a function is tried: it may count up to a size in Python."""


@overload
def opaque(fn: Function, /) -> Function: ...
@overload
def opaque(
    *, fake: Callable[..., Any] | None = None, mutates_args: Iterable[str] = ()
) -> Callable[[Function], Function]: ...
def opaque(fn: Any = None, /, *, fake: Callable[..., Any] | None = None, mutates_args: Iterable[str] = ()) -> Any:
    """Hides a function from Dynamo: `@onegraph.opaque`, or `@onegraph.opaque(fake=..., mutates_args=...)`.

    The function has annotated arguments and a result as `torch.library.custom_op` wants them: tensors, numbers,
    strings, dtypes, devices, lists; tensors or nothing come back. It depends on nothing but its arguments and
    constants, returns no tensor that shares memory with an argument or with another result, and changes only the
    arguments named in `mutates_args`. It has no gradient. A closure that is decorated again and again registers an
    op each time, for the life of the process: decorate at the top of a module.

    `fake` takes the same arguments and returns empty tensors with the sizes, strides, dtypes and devices of the
    results (`torch.library.register_fake`). Without it, the function itself is run on fake tensors at several
    sizes within the declared range; then each size of a result must be constant or a size of an argument, and
    results contiguous.

    Raises CustomOpError: here for a function that can't be an op; while capturing where no fake can be inferred;
    when called, for a result that shares memory with an argument.
    """
    if fn is None:
        return functools.partial(opaque, fake=fake, mutates_args=mutates_args)
    if not isinstance(fn, types.FunctionType) or not isinstance(fake, types.FunctionType | None):
        wrong = fake if isinstance(fn, types.FunctionType) else fn
        raise CustomOpError(
            f"onegraph.opaque takes a Python function, not {wrong!r:.80}",
            hint="write a function at the top of a module, with annotated arguments, and decorate it",
        )
    op = _register(fn, fake, tuple(mutates_args))

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        return op(*args, **kwargs)

    return call


def is_own_frame(filename: str) -> bool:
    """Whether a stack frame is the call of an opaque function in this file, and not the user's."""
    return filename == __file__


def _place(fn: types.FunctionType) -> str:
    return f"{fn.__code__.co_filename}:{fn.__code__.co_firstlineno}: {fn.__module__}.{fn.__qualname__}"


def _register(fn: types.FunctionType, fake: types.FunctionType | None, mutates_args: tuple[str, ...]) -> Any:
    try:
        schema = torch.library.infer_schema(fn, mutates_args=mutates_args)
    except (ValueError, TypeError) as error:
        raise CustomOpError(
            f"{fn.__qualname__} can't be an op: {error}",
            where=_place(fn),
            hint="annotate every argument and the result, such as `def pick(x: torch.Tensor, k: int) -> torch.Tensor`",
        ) from error
    digest = hashlib.sha256("\0".join([schema, *_code_parts(fn), *(_code_parts(fake) if fake else ())]).encode())
    title = re.sub(r"[^0-9A-Za-z]+", "_", f"{fn.__module__}_{fn.__qualname__}").strip("_")
    name = first = f"{title}_{digest.hexdigest()[:12]}"
    with _REGISTERING:
        number = 1
        while name in _REGISTERED and not all(map(_same, _REGISTERED[name], (fn, fake))):
            number += 1
            name = f"{first}_{number}"
        if name not in _REGISTERED:
            LIBRARY.define(name + schema)
            LIBRARY.impl(name, _checked(fn), "CompositeExplicitAutograd")
            torch.library.register_fake(f"onegraph_opaque::{name}", fake or _inferred_fake(fn), lib=LIBRARY)
            _REGISTERED[name] = (fn, fake)
    return getattr(torch.ops.onegraph_opaque, name).default


def _code_parts(fn: types.FunctionType) -> Iterator[str]:
    """What tells one function from another in any process: its code, and the constants that it closes over."""
    yield from _code(fn.__code__)
    for cell in fn.__closure__ or ():
        value = _contents(cell)
        yield repr(value) if isinstance(value, bool | int | float | str | None) else type(value).__qualname__


def _code(code: types.CodeType) -> Iterator[str]:
    yield code.co_code.hex()
    yield repr((code.co_names, code.co_varnames, code.co_freevars))
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _code(constant)
        else:  # the order of a set of strings differs between processes
            yield repr(sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant)


def _same(known: types.FunctionType | None, new: types.FunctionType | None) -> bool:
    """Whether functions with equal code also read the same globals and the same closure."""
    if known is None or new is None:
        return known is new
    ours, theirs = (list(map(_contents, f.__closure__ or ())) for f in (known, new))
    return known.__globals__ is new.__globals__ and all(
        a is b or (type(a) is type(b) and isinstance(a, bool | int | float | str) and repr(a) == repr(b))
        for a, b in zip(ours, theirs, strict=True)
    )


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # an empty cell: the function is defined before its variable
        return cell


def _tensors(values: Iterable[Any]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found


def _checked(fn: types.FunctionType) -> Callable[..., Any]:
    """The op on real tensors: the function, whose results must have memory of their own on every call."""

    def run(*args: Any, **kwargs: Any) -> Any:
        result = fn(*args, **kwargs)
        others = _tensors((*args, *kwargs.values()))
        for tensor in _tensors((result,)):
            if any(share_memory(tensor, other) for other in others):
                raise CustomOpError(
                    f"{fn.__qualname__} returns a tensor of {list(tensor.shape)} that shares memory with an argument "
                    "or with another result",
                    where=_place(fn),
                    hint="return a copy: `return x.clone()`; a changed argument needs no return at all",
                )
            others.append(tensor)
        return result

    return run


def _inferred_fake(fn: types.FunctionType) -> Callable[..., Any]:
    """A fake made of runs at several sizes: a size of a result is a constant, or a size of an argument."""

    def fake(*args: Any, **kwargs: Any) -> Any:
        runs = list(_samples(fake_runs.symbol_ranges((args, kwargs))))
        results = []
        for sizes in runs:
            try:
                results.append(fake_runs.run_on_fakes(fn, args, kwargs, sizes))
            except Exception as error:  # the function is the user's: anything may come out of it
                raise _no_fake(fn, f"at {_told(sizes)} it raises {type(error).__name__}: {error}") from error
        if any(type(result) is not type(results[0]) for result in results):
            raise _no_fake(fn, "its results differ in type from size to size")
        if results[0] is None:
            return None
        known = [size for tensor in _tensors((*args, *kwargs.values())) for size in tensor.shape]
        known += [value for value in (*args, *kwargs.values()) if isinstance(value, torch.SymInt)]
        if isinstance(results[0], torch.Tensor):
            return _like(fn, results, known, runs)
        if isinstance(results[0], list | tuple) and len({len(result) for result in results}) == 1:
            return type(results[0])(_like(fn, list(each), known, runs) for each in zip(*results, strict=True))
        raise _no_fake(fn, f"it returns a {type(results[0]).__name__}, or another number of results for each size")

    return fake


def _samples(ranges: dict[Any, tuple[int, int | None]]) -> Iterator[dict[Any, int]]:
    """Sizes for every symbol: all low, all high, and each in turn low while the rest are high.

    So a symbol with more than one value differs from any constant, and from any other symbol. 0 and 1, which
    many functions treat apart, are taken only where there is nothing else.
    """
    low: dict[Any, int] = {}
    high: dict[Any, int] = {}
    for symbol, (lower, upper) in ranges.items():
        high[symbol] = lower + _FURTHEST if upper is None else min(upper, lower + _FURTHEST)
        low[symbol] = max(lower, min(lower + 2, high[symbol] - 1))
    yield low
    if ranges:
        yield high
    if len(ranges) > 1:
        yield from ({**high, symbol: low[symbol]} for symbol in ranges)


def _like(fn: types.FunctionType, results: list[Any], known: list[Any], runs: list[dict[Any, int]]) -> torch.Tensor:
    """An empty tensor that agrees with one result in all samples. Raises CustomOpError where there is none."""
    if not all(isinstance(result, torch.Tensor) for result in results):
        raise _no_fake(fn, f"it returns a {type(results[0]).__name__}, not a tensor")
    if len({(result.dtype, result.device, result.dim()) for result in results}) > 1:
        raise _no_fake(fn, "dtype, device or rank of its result differ from size to size")
    if not all(result.is_contiguous() for result in results):
        raise _no_fake(fn, f"its result isn't contiguous: strides {results[0].stride()}")
    sizes = []
    for dim, seen in enumerate(zip(*(result.shape for result in results), strict=True)):
        if len(set(seen)) == 1:
            sizes.append(seen[0])
            continue
        matching = [k for k in known if all(fake_runs.size_at(k, at) == s for at, s in zip(runs, seen, strict=True))]
        if not matching:
            tried = ", ".join(f"{size} at {_told(at)}" for size, at in zip(seen, runs, strict=True))
            raise _no_fake(fn, f"size {dim} of its result is neither constant nor a size of an argument: {tried}")
        sizes.append(matching[0])
    return torch.empty(sizes, dtype=results[0].dtype, device=results[0].device)


def _told(sizes: dict[Any, int]) -> str:
    return "size " + ", ".join(map(str, sizes.values())) if sizes else "the traced sizes"


def _no_fake(fn: types.FunctionType, why: str) -> CustomOpError:
    return CustomOpError(
        f"no fake can be inferred for {fn.__qualname__}: {why}",
        where=_place(fn),
        hint="give one: `@onegraph.opaque(fake=lambda x: x.new_empty(x.shape[0], 8))`, with the sizes of the results",
    )
