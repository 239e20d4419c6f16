"""Which operators' calls can be repeated, by their schemas and tags; torch keeps these with names of its own.

Takes each call of a thread before it runs. Raises NotRecordableError for one that no repetition is right for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from onegraph.ir.recording import NotRecordableError
from onegraph.torch_compat import pytree
from onegraph.torch_compat.operators import RecordingMode, named_arguments, written_arguments
from onegraph.torch_compat.storages import StorageWeakRef, alive, storage_of

_TORCHS = frozenset({"aten", "prims", "prim", "torch_attn"})
_NO_KERNELS = ("Meta", "Autograd", "ADInplaceOrView", "Autocast", "Functionalize", "FuncTorch", "Batched", "Fake")
"""How dispatch keys begin below which nothing is computed."""
ALLOCATORS = frozenset(
    {"aten::empty", "aten::empty_strided", "aten::empty_like", "aten::new_empty", "aten::new_empty_strided",
     "aten::empty_permuted"}
)  # fmt: skip
_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
CONSTANT = "aten::lift_fresh"
"""What `torch.tensor(…)` calls with a tensor of the values that the host gave."""
_VALUES = ("int", "float", "bool", "number", "Scalar")


Own = Callable[[Any], Callable[..., Any] | None]


class CheckedOperators(RecordingMode):
    """Operators run as always, if they can be repeated.

    `own` gives the Python function for an operator that is to be seen through, or None; `device` is a device type.
    `refused` is the first call that can't be repeated, also where the caller went on.
    """

    supports_higher_order_operators = True
    refused: NotRecordableError | None = None
    is_paused = False

    def __init__(self, own: Own, device: str) -> None:
        super().__init__()
        self._own = own
        self.device = device

    def refuse(self, func: Any, args: Any, kwargs: Any) -> None:
        """Raises NotRecordableError."""
        refuse_unrepeatable(func, args, kwargs)

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Runs an operator that isn't refused."""
        return func(*args, **kwargs)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, all runs as if nobody watched."""
        before, self.is_paused = self.is_paused, True
        try:
            yield
        finally:
            self.is_paused = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.is_paused:
            return func(*args, **(kwargs or {}))
        try:
            return self._run(func, args, kwargs or {})
        except NotRecordableError as error:
            self.refused = self.refused or error
            raise

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        if not isinstance(func, torch._ops.OpOverload):
            raise NotRecordableError("host_code", str(func), "is a higher-order operator, which runs Python")
        own = self._own(func)
        if own is not None:
            with checked(self):  # a call that passes the dispatcher has left both modes
                return own(*args, **kwargs)
        if self._is_composite(func) and not runs_python(func):
            with self:
                return func._op_dk(_COMPOSITE, *args, **kwargs)
        self.refuse(func, args, kwargs)
        return self.call(func, args, kwargs)

    def _is_composite(self, func: Any) -> bool:
        """Whether it is made of others, which are to be seen one by one. Only inference mode leaves it whole."""
        has = torch._C._dispatch_has_kernel_for_dispatch_key
        return bool(has(func.name(), _COMPOSITE) and not has(func.name(), self.device.upper()))


class CapturedOperators(CheckedOperators):
    """For a recording that the device itself makes: of what is done on the host beside it, nothing is repeated.

    The storages of `inputs` are somebody else's.
    """

    def __init__(self, own: Own, device: str, inputs: Sequence[torch.Tensor] = ()) -> None:
        super().__init__(own, device)
        self._known = {storage_key(one) for one in inputs if one.layout == torch.strided}
        self._used: dict[int, StorageWeakRef] = {}
        self._made: set[int] = set()

    def used_besides(self, results: Sequence[torch.Tensor]) -> list[Any]:
        """The storages that operators were given and that are still there: neither inputs nor those of `results`."""
        theirs = {storage_key(one) for one in results if one.layout == torch.strided}
        found = (alive(weak) for key, weak in self._used.items() if key not in theirs)
        return [one for one in found if one is not None]

    def refuse(self, func: Any, args: Any, kwargs: Any) -> None:
        """As CheckedOperators, and what runs Python. Random numbers are fine."""
        refuse_unrepeatable(func, args, kwargs, draws=True)
        if runs_python(func):
            raise NotRecordableError("host_code", str(func), "is implemented in Python, which a replay doesn't run")

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        for one in tensors((args, kwargs)):
            if one.layout == torch.strided and (key := storage_key(one)) not in self._known:
                self._known.add(key)
                self._used[key] = storage_of(one)  # as long as it is there, no other storage has this key
        return super()._run(func, args, kwargs)

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Runs an operator, if it works on the device alone, but for constants of the host."""
        given = tensors((args, kwargs))
        known = {storage_key(one) for one in given if one.layout == torch.strided}
        if func._schema.name == CONSTANT:
            self._made |= known
        on_host = [one for one in given if one.device.type != self.device]
        if any(one.layout != torch.strided or storage_key(one) not in self._made for one in on_host):
            raise NotRecordableError(
                "host_code", str(func), "reads a tensor of the host, whose values a replay wouldn't see"
            )
        result = func(*args, **kwargs)
        made = [one for one in tensors(result) if one.layout != torch.strided or storage_key(one) not in known]
        self._made |= {storage_key(one) for one in made if one.layout == torch.strided}
        changed = tensors([named_arguments(func, args, kwargs).get(name) for name in written_arguments(func)])
        is_work = func._schema.name not in (*ALLOCATORS, CONSTANT)
        if is_work and any(one.device.type != self.device for one in (*made, *changed)):
            raise NotRecordableError("host_code", str(func), "computes on the host, which a replay doesn't do")
        return result


@contextmanager
def checked(watch: CheckedOperators) -> Iterator[None]:
    """Inside, `watch` sees this thread's operators, and tensors whose values go to Python without them are refused."""
    with _RefusedReads(watch), watch:
        yield


class _RefusedReads(TorchFunctionMode):
    reads = (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.__dlpack__)

    def __init__(self, watch: CheckedOperators) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.reads and not self._watch.is_paused:
            error = NotRecordableError("host_read", f"Tensor.{func.__name__}", "gives Python the values of a tensor")
            self._watch.refused = self._watch.refused or error
            raise error
        return func(*args, **(kwargs or {}))


def storage_key(tensor: torch.Tensor) -> int:
    """The same for tensors that share a storage, as long as that lives."""
    return int(tensor.untyped_storage()._cdata)


def tensors(values: Any) -> list[torch.Tensor]:
    """Those in a nested structure."""
    return [one for one in pytree.tree_leaves(values) if isinstance(one, torch.Tensor)]


def runs_python(func: Any) -> bool:
    """Whether an operator that isn't torch's own has a kernel in Python: of `custom_op` or `Library.impl`."""
    if func.namespace in _TORCHS:
        return False
    begin = func.name().replace("::", "/") + "/"
    kernels = (one.removeprefix(begin) for one in torch.library._impls.copy() if one.startswith(begin))
    return any(not key.startswith(_NO_KERNELS) for key in kernels)


def refuse_unrepeatable(func: Any, args: Any, kwargs: Any, *, draws: bool = False) -> None:
    """Raises NotRecordableError for a call of an operator that a recording can't repeat.

    With `draws`, random numbers are fine: each replay draws others.
    """
    tags, name = func.tags, str(func)
    if torch.Tag.cudagraph_unsafe in tags:
        raise NotRecordableError("unsafe_op", name, "is tagged as one that can't be recorded")
    if torch.Tag.data_dependent_output in tags or _returns_values(func):
        raise NotRecordableError("host_read", name, "gives Python a value that depends on a tensor's")
    if _has_any_size(func, args, kwargs):
        raise NotRecordableError("data_dependent_shape", name, "gives a tensor whose size depends on values")
    if not draws and _is_random(func, args, kwargs):
        raise NotRecordableError("random", name, "draws random numbers, and a replay would draw the same")


def _returns_values(func: Any) -> bool:
    """Of others' operators, torch's own are tagged."""
    return func.namespace not in _TORCHS and any(str(one.type) in _VALUES for one in func._schema.returns)


def _has_any_size(func: Any, args: Any, kwargs: Any) -> bool:
    if not _has_dynamic_shape(func):
        return False
    given = named_arguments(func, args, kwargs)
    if func._schema.name == "aten::index":  # by a mask alone
        return any(one is not None and one.dtype in (torch.bool, torch.uint8) for one in given["indices"])
    return given.get("output_size") is None


@functools.cache
def _has_dynamic_shape(func: Any) -> bool:
    """Torch tags the functional overload, and not always that with `out`."""
    tag = torch.Tag.dynamic_output_shape
    if torch.Tag.out in func.tags or "out" in func._overloadname:
        packet = func._overloadpacket
        return any(tag in getattr(packet, one).tags for one in packet.overloads())
    return tag in func.tags


def _is_random(func: Any, args: Any, kwargs: Any) -> bool:
    """Attention and dropout draw nothing where they drop nothing."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    defaults = {one.name: one.default_value for one in func._schema.arguments if one.has_default_value()}
    given = {**defaults, **named_arguments(func, args, kwargs)}
    if "dropout_p" in given:
        return bool(given["dropout_p"] != 0)
    return not any(given.get(name) is False for name in ("train", "training"))
