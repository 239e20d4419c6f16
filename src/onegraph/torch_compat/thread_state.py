"""torch's settings that belong to a thread, carried from one thread to another.

Takes: the settings of the thread that makes a `ThreadState`. Gives: `run`, which calls a function under them in any
other thread. Carried are Python's context variables, in which torch keeps the overrides of `torch._dynamo.config`
and `torch._inductor.config`, the number of threads, the default device, autocast and the grad mode.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from typing import TypeVar

import torch

AUTOCAST_DEVICES = ("cpu", "cuda")

T = TypeVar("T")


class ThreadState:
    """The settings of the thread that makes it, as they are then."""

    def __init__(self) -> None:
        self._context = contextvars.copy_context()
        self._num_threads = torch.get_num_threads()
        self._device = torch.get_default_device()
        self._grad = torch.is_grad_enabled()
        self._autocast = {
            device: (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in AUTOCAST_DEVICES
        }

    def run(self, function: Callable[[], T]) -> T:
        """Calls the function in this thread, under the settings; they stay set in it."""
        torch.set_num_threads(self._num_threads)  # OpenMP's own number is the thread's: a new one has the default
        if torch.get_default_device() != self._device:
            torch.set_default_device(self._device)
        for device, (enabled, dtype) in self._autocast.items():
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)
        with torch.set_grad_enabled(self._grad):
            return self._context.run(function)
