"""Which target is chosen: for a setting, for tensors, and what it says where a device isn't there."""

from __future__ import annotations

import pytest
import torch

from onegraph import targets
from onegraph.errors import CompileError, ConfigError
from onegraph.ir.target import KernelSource
from onegraph.targets.cpu.target import CpuTarget


def test_the_device_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    assert targets.resolve_device("cpu") == "cpu"
    with pytest.raises(ConfigError, match="did you mean") as caught:
        targets.resolve_device("cda")
    assert "cuda" in str(caught.value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert targets.resolve_device("auto") == "cpu"
    with pytest.raises(ConfigError, match="device='cuda', but"):
        targets.resolve_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert targets.resolve_device("auto") == targets.resolve_device("cuda") == "cuda"


def test_the_device_that_tensors_share() -> None:
    assert targets.common_device([]) == targets.common_device(["cpu", "cpu"]) == "cpu"
    assert targets.common_device(["cpu", "cuda"]) == targets.common_device(["cuda", "cpu"]) == "cuda"
    with pytest.raises(ConfigError, match="doesn't compile for xpu"):
        targets.target_for(targets.common_device(["xpu"]))


def test_kernels_of_another_device_are_refused_by_the_cpu() -> None:
    with pytest.raises(CompileError, match="another device"):
        CpuTarget().start_build([KernelSource("a", (), "", "triton", "triton_poi_fused_0")])
