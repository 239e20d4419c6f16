"""What a warm start knows without importing Dynamo and Inductor, compared with what these say."""

from __future__ import annotations

import functools
import threading
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo import convert_frame
from torch._dynamo import utils as dynamo_utils
from torch._inductor import utils as inductor_utils

from onegraph.compilers.loading import ALIGNMENT
from onegraph.torch_compat import residual_calls
from onegraph.torch_compat.changed_config import changed_config
from onegraph.torch_compat.traced_function import python_callable, traced_function


class Hooked(nn.Linear):
    def __init__(self, kind: str) -> None:
        super().__init__(2, 2)
        getattr(self, kind)(lambda *args: None)


class OwnCall(nn.Linear):
    def __call__(self, *args: Any) -> Any:
        return super().__call__(*args)


class Callable:
    def __call__(self, x: Any) -> Any:
        return x

    def method(self, x: Any) -> Any:
        return x


CALLABLES: dict[str, Any] = {
    "a module": nn.Linear(2, 2),
    "a forward hook": Hooked("register_forward_hook"),
    "a forward pre-hook": Hooked("register_forward_pre_hook"),
    "a backward hook": Hooked("register_full_backward_hook"),
    "a module with a call of its own": OwnCall(2, 2),
    "a graph module": torch.fx.symbolic_trace(nn.Linear(2, 2)),
    "a module without a forward": nn.Module(),
    "a method": nn.Linear(2, 2).forward,
    "a method of a plain object": Callable().method,
    "an object": Callable(),
    "a function": functools.wraps,
    "a lambda": lambda x: x,
    "a partial": functools.partial(lambda x, y: x, 1),
    "a builtin": torch.relu,
}


@pytest.mark.parametrize("name", CALLABLES)
def test_the_traced_function_is_the_one_that_dynamo_traces(name: str) -> None:
    given = CALLABLES[name]
    try:
        function, owner = convert_frame.get_traced_fn(python_callable(given))
    except Exception:
        with pytest.raises((RuntimeError, AttributeError)):
            traced_function(given)
        return
    found, self = traced_function(given)
    assert found is function and self is owner


def test_a_global_hook_counts() -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        module = nn.Linear(2, 2)
        assert traced_function(module)[0] is convert_frame.get_traced_fn(module)[0] is not nn.Linear.forward
    finally:
        handle.remove()


def test_inductors_alignment() -> None:
    assert ALIGNMENT == inductor_utils.ALIGNMENT


def test_the_helpers_of_residual_code_do_what_dynamos_do() -> None:
    ours, tensor = residual_calls.module("torch._dynamo.utils"), torch.randn(3, 4)[1:, 1:]
    for name, args in (("call_size", (tensor, 1)), ("call_stride", (tensor, 0)), ("call_storage_offset", (tensor,))):
        assert getattr(ours, name)(*args) == getattr(dynamo_utils, name)(*args)
    for holder in (nn.Linear(2, 2), Callable(), threading.local()):
        ours.object_setattr_ignore_descriptor(holder, "factor", 3)
        assert holder.factor == 3
    assert ours.object_new is object.__new__ and ours.istype is dynamo_utils.istype
    assert residual_calls.module("math").sqrt(4.0) == 2.0


def test_a_setting_that_was_patched_for_a_while_is_unchanged() -> None:
    import torch._inductor.config as config

    before = changed_config()
    with config.patch({"max_autotune": not config.max_autotune}):
        assert changed_config() != before
    assert changed_config() == before
