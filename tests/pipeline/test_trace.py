"""TORCH_TRACE and TORCH_LOGS work with onegraph as they do with torch, on a cold and on a warm start."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.traces import entries, rendered

RUN = ["-m", "onegraph.cli.main", "run", "--prompt", "def ", "--max-tokens", "2", "--num-kv-blocks", "256"]
LOGS = "output_code,graph_code,graph_breaks,guards,recompiles,dynamic"
ENTRIES = (
    *("process", "config", "captured_graph", "ledger", "constraints", "split_graph", "execution_plan", "store"),
    *("piece_0_before_passes", "piece_0_output_code", "recording_plan", "recordings", "timeline", "explain"),
)

SCRIPT = """
import sys, torch, onegraph

class Branches(torch.nn.Module):
    def forward(self, x):
        if x.shape[0] % 128 == 0:  # planted
            return x * 2
        return x + 1

class Prints(torch.nn.Module):
    def forward(self, x):
        print("planted")
        return x + 1

class Scales(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = 2
    def forward(self, x):
        return x * self.scale

def compiled(module):
    shapes = {"x": {0: torch.export.Dim("T", min=2, max=512)}}
    return onegraph.compile(module, dynamic_shapes=shapes, config={"backend": "eager"})

x = torch.ones(4, 4)
module = Scales()
call = compiled(module)
call(x)
print("imported:", *(name for name in ("torch._dynamo", "torch._inductor") if name in sys.modules))
for module in (Prints(), Branches()):
    try:
        compiled(module)(x)
    except onegraph.errors.OnegraphError:
        pass
    else:
        raise SystemExit("it was compiled")
call.scale = 3
assert call(x)[0, 0] == 3
stock = torch.compile(lambda x: x.sin() + 1, backend="onegraph", options={"backend": "eager"})
with torch.no_grad():
    stock(x)
"""


def run(words: list[str], folder: Path, **variables: str) -> str:
    environment = {**os.environ, "ONEGRAPH_CACHE_ROOT": str(folder / "cache"), "OMP_NUM_THREADS": "1", **variables}
    result = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


class Traced:
    """A traced process: what it printed, its entries, what tlparse made of them."""

    def __init__(self, words: list[str], folder: Path, name: str) -> None:
        self.printed = run(words, folder, TORCH_TRACE=str(folder / name), TORCH_LOGS=LOGS)
        (log,) = (folder / name).iterdir()  # children write none
        self.entries = entries(log)
        self.report = rendered(log, folder / f"{name}-report")

    def log(self, name: str) -> str:
        """What the log of that name printed."""
        lines = [line for line in self.printed.splitlines() if f"[__{name}]" in line]
        return "\n".join(line.partition(f"[__{name}] ")[2] for line in lines)

    @property
    def dynamic(self) -> str:
        return "\n".join(line for line in self.printed.splitlines() if re.match(r"I\d{4} ", line))


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Traced]:
    """A cold start, a warm one; and twice a program with a module that is captured twice and two that are refused."""
    folder = tmp_path_factory.mktemp("trace")
    (folder / "planted.py").write_text(SCRIPT)
    made = {start: Traced(RUN, folder, start) for start in ("cold", "warm")}
    return {**made, **{name: Traced([str(folder / "planted.py")], folder, name) for name in ("first", "second")}}


@pytest.mark.parametrize("start", ["cold", "warm"])
def test_one_log_that_tlparse_renders_with_our_entries(traced: dict[str, Traced], start: str) -> None:
    one = traced[start]
    assert f"start     {start}" in one.printed
    assert set(ENTRIES) <= one.entries.keys()
    assert {f"onegraph_{name}" for name in ENTRIES} <= one.report.keys()
    assert "= kernels['kernel_" in one.entries["piece_0_output_code"]
    assert "piece_1(" in one.entries["split_graph"]


def test_a_warm_start_shows_what_the_cold_one_did(traced: dict[str, Traced]) -> None:
    cold, warm = traced["cold"].entries, traced["warm"].entries
    graphs = [name for name in cold if name.startswith(("piece_", "captured", "split", "execution", "constraints"))]
    assert len(graphs) > 8
    assert {name: warm.get(name) for name in graphs} == {name: cold[name] for name in graphs}
    evaluation = warm["ledger_evaluation"]
    assert evaluation["verdict"].startswith("taken: ") and evaluation["held"] == len(evaluation["checks"]) > 100
    assert all(check["holds"] and check["recorded"] == check["now"] for check in evaluation["checks"])


def test_the_store_says_what_it_had(traced: dict[str, Traced]) -> None:
    cold, warm = (traced[start].entries["store"] for start in ("cold", "warm"))
    assert cold["index"]["status"] == "miss" and warm["index"]["status"] == "hit"
    compiled = [piece for piece in cold["pieces"] if piece["key"]]
    assert {piece["store"] for piece in compiled} == {"miss"}
    assert all(piece["why"] == "no artifact has this key" and not piece["differs"] for piece in compiled)
    assert {piece["store"] for piece in warm["pieces"] if piece["key"]} == {"hit"}
    assert {piece["key"] for piece in warm["pieces"]} == {piece["key"] for piece in cold["pieces"]}


@pytest.mark.parametrize("start", ["cold", "warm"])
def test_the_timeline_has_the_start_in_order(traced: dict[str, Traced], start: str) -> None:
    timeline = traced[start].entries["timeline"]
    events: dict[str, dict[str, Any]] = {}
    for event in timeline["events"]:
        events.setdefault(event["name"], event)
    stages = ["import", "weights", "index", "capture", "split", "passes", "compile or load", "plan", "bind"]
    expected = [*(stages if start == "cold" else stages[:3]), "record", "first token"]
    begun = [events[name]["start_s"] for name in expected]
    assert begun == sorted(begun) and events["import"]["start_s"] == 0
    assert {"piece 0", "kernels"} <= events.keys()
    assert 0 < timeline["ready_s"] <= timeline["first_token_s"]
    details = [event["detail"] for event in timeline["events"] if event["name"] == "import"]
    assert {"torch", "transformers"} <= set(details)
    assert ("Dynamo and Inductor" in details) == (start == "cold")


def test_a_constraint_stands_where_people_look_for_it(traced: dict[str, Traced]) -> None:
    one = traced["second"]
    page = one.report["compilation_metrics"]
    assert "T % 128 == 0   (narrows, capture)" in page and "planted.py:6 in the model" in page
    assert "ConstraintError" in one.report["failures_and_restarts"]


@pytest.mark.parametrize("start", ["cold", "warm"])
def test_torch_logs_print_on_each_start(traced: dict[str, Traced], start: str) -> None:
    one = traced[start]
    assert "def call(" in one.log("output_code")
    assert "class " in one.log("graph_code") and "paged_attention" in one.log("graph_code")
    assert "on every call" in one.log("guards") and "L['self']" not in one.log("guards")
    assert ("is captured: no trace" in one.log("recompiles")) == (start == "cold")
    assert one.log("graph_breaks") == ""  # there is one graph
    assert ("create_unbacked" if start == "cold" else "num_tokens in ") in one.dynamic


def test_a_warm_start_is_traced_without_dynamo(traced: dict[str, Traced]) -> None:
    first, second = traced["first"], traced["second"]
    assert "imported: torch._dynamo torch._inductor\n" in first.printed and "imported:\n" in second.printed
    for one in first, second:  # what Dynamo counts later goes on from there
        assert len(re.findall(r"\[0/0\] \[__guards\] GUARDS of Scales", one.printed)) == 1
        assert not re.search(r"\[0/0\] \[__graph_breaks\]", one.printed)


def test_torch_logs_say_why_there_is_no_graph_and_why_again(traced: dict[str, Traced]) -> None:
    one = traced["second"]
    assert "planted.py:12: print(" in one.log("graph_breaks")
    assert "Scales is captured once more: self.scale was 2, and now is 3" in one.log("recompiles")
