"""Tests here need a GPU; those that take a `device` have a fake one where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import write_model

from onegraph import api
from onegraph.config.resolve import DeviceRules
from onegraph.targets.cpu.target import CpuTarget
from onegraph.targets.cuda import graphs
from tests.cuda.fake_graphs import FakeCuda, FakeRecorder, Watched


@pytest.fixture(autouse=True)
def gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """Skips where there is none; inference only, as everywhere in onegraph."""
    if not torch.cuda.is_available() and "device" not in request.fixturenames:
        pytest.skip("there is no CUDA device")
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@dataclass
class Device:
    """What recordings are made on: a GPU, or CPU tensors with CUDA graphs that are faked. `name` is torch's."""

    name: str
    cuda: Watched
    fake: FakeCuda | None
    recorded: list[list[tuple[int, ...]]] = field(default_factory=list)
    """The sizes of the inputs of what was recorded, in order."""

    def recorder(self, **options: Any) -> Any:
        kind = graphs.CudaGraphRecorder if self.fake is None else FakeRecorder
        return kind(**options)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    """The GPU; where there is none, the recorder of CUDA graphs on a fake one, which compiled models then use."""
    fake = None if torch.cuda.is_available() else FakeCuda()
    made = Device("cpu" if fake else "cuda", Watched(fake or torch.cuda), fake)
    monkeypatch.setattr(graphs, "cuda", made.cuda)
    if fake is not None:
        monkeypatch.setattr(graphs, "kernels_recorded", fake.host_kernels)
        monkeypatch.setattr(FakeRecorder, "cuda", fake, raising=False)
        monkeypatch.setattr(CpuTarget, "recorder", lambda self, **options: FakeRecorder(**options))
    rules = api.device_rules

    def rules_of_a_gpu(device_type: str, **asked: Any) -> DeviceRules:
        return rules("cuda", **asked)

    monkeypatch.setattr(api, "device_rules", rules_of_a_gpu)
    record = graphs.CudaGraphRecorder.record

    def noted(self: Any, run: Any, inputs: Any) -> Any:
        made.recorded.append([tuple(one.shape) for one in inputs])
        return record(self, run, inputs)

    monkeypatch.setattr(graphs.CudaGraphRecorder, "record", noted)
    return made


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama."""
    return write_model(tmp_path_factory.mktemp("models") / "tiny")
