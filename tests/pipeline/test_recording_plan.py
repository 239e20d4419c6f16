"""What will be recorded: chosen by traffic or by memory, and told before; and lines that warm starts know, too."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim

import onegraph
from onegraph.errors import ConfigError, RecordingError

TOKENS = Dim("num_tokens", min=1, max=64)


class Wide(nn.Module):
    """A row of its result takes 256 KiB."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 65536, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


class Noisy(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand_like(x)


def planned(module: nn.Module, **fields: Any) -> dict[str, Any]:
    config = {"backend": "eager", "cudagraph_mode": "FULL", **fields}
    compiled = onegraph.compile(module, dynamic_shapes={"x": {0: TOKENS}}, config=config)
    with torch.inference_mode():
        compiled.warm_up({"x": torch.randn(3, 16)})
    found: dict[str, Any] = compiled.explain().to_dict()["plan"]
    assert found["planned"]["sizes"]["FULL"] == [one["num_tokens"] for one in found["sizes"]]
    return found


def test_sizes_are_chosen_for_traffic() -> None:
    plan = planned(Wide(), cudagraph_traffic={"1": 90, "3": 10, "64": 1})
    assert plan["planned"]["sizes"] == {"FULL": [1, 3, 64]} and plan["planned"]["padding"] == {}
    plan = planned(Wide(), cudagraph_traffic={"1": 90, "3": 10, "64": 1}, cudagraph_padding={"x": "zero"})
    assert plan["planned"]["sizes"] == {"FULL": [1, 3, 64]} and plan["planned"]["uncovered"] == []
    assert plan["planned"]["padding"]["FULL"] == {"most": 0.938, "at": 4, "runs_as": 64, "of_traffic": 0.0}


def test_sizes_fit_the_memory_that_recordings_may_take() -> None:
    traffic, padding = {"1": 90, "4": 10, "20": 50, "64": 1}, {"x": "zero"}
    plan = planned(Wide(), cudagraph_memory_mib=6, cudagraph_traffic=traffic, cudagraph_padding=padding)
    assert plan["planned"]["sizes"] == {"FULL": [1, 20]}, "16 MiB for 64 rows would be too much"
    assert 21 * 65536 * 4 <= plan["planned"]["expected_bytes"] <= 6 * 2**20
    assert sum(one["bytes"] for one in plan["sizes"]) <= 6 * 2**20
    with pytest.raises(ConfigError, match="no size from 1 to 64 is worth recording within 1 MiB"):
        planned(Wide(), cudagraph_memory_mib=1, cudagraph_traffic={"64": 1})


class Deep(nn.Module):
    """What its kernels hand on takes more than its result."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 4096), nn.Linear(4096, 16)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[1](self.layers[0](x).relu().sin())


def test_the_largest_call_that_was_tried_leaves_nothing_behind() -> None:
    """Its memory is as large as it needs: it goes before others are recorded, and a second warm-up changes nothing."""
    config = {"cudagraph_mode": "FULL", "cudagraph_memory_mib": 1}
    compiled = onegraph.compile(Deep(), dynamic_shapes={"x": {0: TOKENS}}, config=config)
    found = []
    with torch.inference_mode():
        for _ in range(2):
            compiled.warm_up({"x": torch.randn(3, 16)})
            plan = compiled.explain().to_dict()["plan"]
            found.append([one["num_tokens"] for one in plan["sizes"]])
            assert sum(one["bytes"] for one in plan["sizes"]) <= 2**20
    assert found[0] == found[1] and found[0] and max(found[0]) < 64


def test_a_range_that_no_size_is_in() -> None:
    for least, most, recorded in ((5, 7, [7]), (600, 2000, [])):
        dim = Dim("n", min=least, max=most)
        config = {"backend": "eager", "cudagraph_mode": "FULL"}
        compiled = onegraph.compile(Wide(), dynamic_shapes={"x": {0: dim}}, config=config)
        with torch.inference_mode():
            compiled.warm_up({"x": torch.randn(least, 16)})
        plan = compiled.explain().to_dict()["plan"]
        assert [one["num_tokens"] for one in plan["sizes"]] == recorded
        assert plan["planned"]["uncovered"]
    config = {"backend": "eager", "cudagraph_mode": "FULL", "cudagraph_lazy": True}
    compiled = onegraph.compile(Wide(), dynamic_shapes={"x": {0: Dim("n", min=600, max=2000)}}, config=config)
    with torch.inference_mode(), pytest.raises(ConfigError, match="of those in 600..2000 none is recorded by itself"):
        compiled.warm_up({"x": torch.randn(600, 16)})


def test_the_plan_is_told_before_anything_is_recorded(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="onegraph"):
        planned(Wide(), cudagraph_capture_sizes=[1, 4])
    told = [record.getMessage() for record in caplog.records if "recording FULL" in record.getMessage()]
    assert len(told) == 1 and "at 1, 4 (as asked for)" in told[0] and "MiB and" in told[0]
    assert "not recorded: 5..64: no recording of this size" in told[0]


def test_counts_and_sizes_are_read_with_care() -> None:
    for wrong in ({"0": 1}, {"-1": 1}, {"1": -1}, {"1": 1.5}, {"one": 1}, [1]):
        with pytest.raises(ConfigError, match="cudagraph_traffic"):
            planned(Wide(), cudagraph_traffic=wrong)
    for wrong in (-1, 1.5, "1"):
        with pytest.raises(ConfigError, match="cudagraph_memory_mib"):
            planned(Wide(), cudagraph_memory_mib=wrong)
    with pytest.raises(ConfigError, match="nothing is recorded"):
        planned(Wide(), cudagraph_mode="NONE", cudagraph_memory_mib=1)
    with pytest.raises(ConfigError, match="can't be kept by cudagraph_lazy"):
        planned(Wide(), cudagraph_lazy=True, cudagraph_memory_mib=1)


def test_a_warm_start_knows_the_user_s_line_too(fresh_cache: Path) -> None:
    lines = []
    for start in ("miss", "hit"):
        config = {"backend": "eager", "cudagraph_mode": "FULL", "cudagraph_capture_sizes": [4]}
        compiled = onegraph.compile(Noisy(), dynamic_shapes={"x": {0: TOKENS}}, config=config)
        with torch.inference_mode(), pytest.raises(RecordingError) as raised:
            compiled.warm_up({"x": torch.randn(3, 16)})
        index = compiled.explain().to_dict()["index"]
        assert index is not None and index["status"] == start
        lines.append(raised.value.where)
    assert lines[0] == lines[1] and lines[0] is not None and "test_recording_plan.py" in lines[0]
