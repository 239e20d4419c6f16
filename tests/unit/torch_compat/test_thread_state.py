"""torch's settings of one thread, in another."""

from __future__ import annotations

import threading
from typing import Any

import torch
import torch._dynamo.config
import torch._inductor.config

from onegraph.torch_compat.thread_state import ThreadState


def facts() -> dict[str, Any]:
    return {
        "threads": torch.get_num_threads(),
        "device": torch.get_default_device(),
        "grad": torch.is_grad_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "dynamo": torch._dynamo.config.recompile_limit,
        "inductor": torch._inductor.config.max_autotune,
    }


def in_another_thread(function: Any) -> Any:
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


def test_everything_is_carried_and_nothing_is_left_behind() -> None:
    before, num_threads = facts(), torch.get_num_threads()
    plain = in_another_thread(facts)
    torch.set_num_threads(num_threads + 2)
    try:
        with (
            torch.no_grad(),
            torch.autocast("cpu", torch.float16),
            torch.device("meta"),
            torch._dynamo.config.patch(recompile_limit=99),
            torch._inductor.config.patch(max_autotune=True),
        ):
            state, expected = ThreadState(), facts()
    finally:
        torch.set_num_threads(num_threads)
    assert all(expected[name] != plain[name] for name in expected)
    assert in_another_thread(lambda: state.run(facts)) == expected
    torch.set_num_threads(num_threads)
    assert facts() == before
    assert in_another_thread(facts) == plain
