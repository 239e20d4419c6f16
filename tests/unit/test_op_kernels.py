"""Kernels of ops: found in a graph, and a model's explanation says so where they can't be had."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from torch.export import Dim

import onegraph
import onegraph.ops
from onegraph import op_kernels
from onegraph.counters import counters
from onegraph.errors import CompileError
from onegraph.ir.key import Key
from onegraph.store.store import Store
from onegraph.targets.cpu.target import CpuTarget


class Writes(torch.nn.Module):
    def forward(self, k: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        torch.ops.onegraph.write_kv_cache(k, k, cache, cache, slots)
        return k + 1


def test_a_graph_that_calls_an_op_is_told_from_one_that_does_not() -> None:
    assert op_kernels.uses_own_ops(torch.fx.symbolic_trace(Writes()))
    assert not op_kernels.uses_own_ops(torch.fx.symbolic_trace(torch.nn.ReLU()))


def test_what_cannot_be_built_is_a_downgrade_that_explain_shows(
    fresh_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: CpuTarget) -> None:
        raise CompileError("there is no compiler today")

    monkeypatch.setattr(op_kernels, "_installed", {})
    monkeypatch.setattr(op_kernels, "_begun", {})
    monkeypatch.setattr(CpuTarget, "start_op_kernels_build", fail)
    tokens = Dim("tokens", min=1, max=8)
    arguments = torch.ones(3, 1, 4), torch.zeros(2, 4, 1, 4), torch.tensor([0, 1, 2])
    with counters.expect(op_kernels_missing=1), torch.inference_mode():
        for _ in range(2):
            compiled = onegraph.compile(
                Writes(), dynamic_shapes={"k": {0: tokens}, "slots": {0: tokens}}, config={"backend": "eager"}
            )
            assert torch.equal(compiled(*arguments), arguments[0] + 1)
            assert any("there is no compiler today" in note for note in compiled.explain().notes)


def test_kernels_that_another_builds_are_not_waited_for_until_they_are_needed(
    fresh_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(op_kernels, "_installed", {})
    monkeypatch.setattr(op_kernels, "_begun", {})
    target, store = CpuTarget(), Store(fresh_cache)
    key = Key.of({"op_kernels": target.op_kernel_factors(), "target": target.name})
    held, give_back = threading.Event(), threading.Event()

    def hold() -> None:  # as another process does
        with store.lock(key.digest):
            held.set()
            give_back.wait(30)

    other = threading.Thread(target=hold)
    other.start()
    assert held.wait(30)
    with op_kernels.op_kernels_begun(target, store):
        assert op_kernels._begun == {}
    with store.lock(key.digest, before_waiting=give_back.set):  # other locks are given back first, too
        other.join(30)
    with op_kernels.op_kernels_begun(target, store):
        assert list(op_kernels._begun) == ["cpu"]


def test_a_build_that_nobody_waits_for_gives_its_lock_back_from_any_thread(
    fresh_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when what comes after it fails: another process would wait for as long as this one lives."""
    monkeypatch.setattr(op_kernels, "_installed", {})
    monkeypatch.setattr(op_kernels, "_begun", {})
    target, store = CpuTarget(), Store(fresh_cache)
    key = Key.of({"op_kernels": target.op_kernel_factors(), "target": target.name})

    def wait(kind: type[BaseException] | None) -> None:
        raise AssertionError(f"the lock is still held after {kind}")

    with pytest.raises(CompileError), op_kernels.op_kernels_begun(target, store):
        raise CompileError("capture failed, say")
    with store.lock(key.digest, before_waiting=lambda: wait(CompileError)):
        pass
    with op_kernels.op_kernels_begun(target, store):
        begun = op_kernels._begun.pop("cpu")  # as `install_op_kernels` takes it
        thread = threading.Thread(target=begun.held.close)
        thread.start()
        thread.join()
    with store.lock(key.digest, before_waiting=lambda: wait(None)):
        pass
