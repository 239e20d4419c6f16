"""The index from outside: a second process traces nothing, and is right, whatever has changed meanwhile."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

MODEL = """
import dataclasses, torch
from torch import nn

SCALE = 2.0

@dataclasses.dataclass
class Result:
    hidden: torch.Tensor
    size: int

def shifted(h, by=1.0):
    return h + by

class Model(nn.Module):
    def __init__(self, width=8, tied=False):
        super().__init__()
        self.up, self.down = nn.Linear(width, 8), nn.Linear(8, width)
        self.other = self.up if tied else nn.Linear(width, 8)
        self.factor, self.calls = 0.5, 0

    def forward(self, x):
        self.calls += 1
        h = self.down(torch.relu(self.up(x) + self.other(x)))
        return Result(shifted(h * SCALE) * self.factor, x.shape[0])
"""

PROGRAM = """
import importlib, json, sys
import torch, onegraph
from onegraph.counters import counters
from torch.export import Dim

def run(before, change, after, config):
    sys.modules.pop("model", None)
    if "torch._dynamo" in sys.modules:  # keeps modules by their names
        sys.modules["torch._dynamo.symbolic_convert"]._import_module.cache_clear()
    model = importlib.import_module("model")
    torch.manual_seed(0)
    width, tied, dtype = 8, False, torch.float32
    names = {"model": model, "torch": torch, "width": width, "tied": tied, "dtype": dtype}
    exec(before, names)
    width, tied, dtype = names["width"], names["tied"], names["dtype"]
    module, reference = model.Model(width, tied).to(dtype), model.Model(width, tied).to(dtype)
    reference.load_state_dict(module.state_dict())
    for one in (module, reference):
        exec(change, {**names, "one": one})
    shapes, seen = {"x": {0: Dim("n", min=1, max=64)}}, counters.snapshot()
    compiled = onegraph.compile(module, dynamic_shapes=shapes, config=config)

    def error(*sizes):
        worst = 0.0
        for size in sizes:
            x = torch.randn(size, width, dtype=dtype)
            got, wanted = compiled(x), reference(x)
            assert type(got) is model.Result and got.size == size and module.calls == reference.calls
            worst = max(worst, (got.hidden - wanted.hidden).abs().max().item())
        return worst

    with torch.no_grad():
        worst = error(5, 1, 64)
        imported = [name for name in ("torch._dynamo", "torch._inductor") if name in sys.modules]
        exec(after, {"compiled": compiled, "module": module, "reference": reference})
        worst = max(worst, error(3))
    facts, now = compiled.explain().to_dict(), counters.snapshot()
    torch.set_default_dtype(torch.float32)
    return {"index": facts["index"], "error": worst, "imported": imported,
            "counters": {name: number - seen.get(name, 0) for name, number in now.items()},
            "pieces": [one["backend"] for one in facts["pieces"]],
            "stores": [range["store"] for one in facts["pieces"] for range in one["ranges"]]}

print(json.dumps([run(*case) for case in json.loads(sys.argv[1])]))
"""

EAGER = {"backend": "eager"}


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model and a cache that a first process has filled, for Inductor and for backend=eager."""
    folder = tmp_path_factory.mktemp("index")
    (folder / "model.py").write_text(MODEL)
    for facts in start_all(folder, [("", "", "", {}), ("", "", "", EAGER)]):
        assert facts["index"]["status"] == "miss" and facts["counters"]["dynamo_compiles"] >= 1
    return folder


def start(
    folder: Path, config: Any = None, before: str = "", change: str = "", after: str = "", **variables: str
) -> dict[str, Any]:
    """Runs the program with the folder's model and cache; `before` changes what the model is made of, `change` it."""
    return start_all(folder, [(before, change, after, config or {})], **variables)[0]


def start_all(folder: Path, cases: list[tuple[str, str, str, Any]], **variables: str) -> list[dict[str, Any]]:
    """The same for several cases, one after the other in one process."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ONEGRAPH_")}
    environment.update({"ONEGRAPH_CACHE_ROOT": str(folder / "root"), **variables})
    environment["PYTHONPATH"] = os.pathsep.join([str(folder), str(Path(__file__).parents[2]), *sys.path])
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(cases)],
        env=environment, capture_output=True, text=True, timeout=300, cwd=folder,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    found: list[dict[str, Any]] = json.loads(result.stdout.splitlines()[-1])
    assert all(facts["error"] < 1e-4 for facts in found), found
    return [{**facts, "stderr": result.stderr} for facts in found]


def copied(kept: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(kept, tmp_path / "copy", symlinks=True))


def test_a_second_process_traces_and_compiles_nothing_and_imports_no_compiler(kept: Path, tmp_path: Path) -> None:
    facts = start(copied(kept, tmp_path), PATH="/nowhere")
    assert facts["index"]["status"] == "hit" and not facts["imported"]
    for name in ("dynamo_compiles", "aot_compiles", "inductor_compiles", "gxx_runs", "store_writes"):
        assert facts["counters"].get(name, 0) == 0, name
    assert set(facts["stores"]) == {"hit"}


CHANGES = {
    "a global constant": ("model.SCALE = 3.0", "", "SCALE was 2.0, and is 3.0"),
    "a default argument": ("model.shifted.__defaults__ = (2.0,)", "", "shifted"),
    "an attribute": ("", "one.factor = 0.25", "self.factor was 0.5, and is 0.25"),
    "the mode": ("", "one.eval()", "training"),
    "tied weights": ("tied = True", "", ""),
    "a width": ("width = 6", "", ""),
    "the dtype": ("dtype = torch.float64", "", ""),
    "a hook": ("", "one.up.register_forward_hook(lambda *args: args[-1] * 2)", "hooks"),
    "a module": ("", "one.up = torch.nn.Sequential(one.up, torch.nn.ReLU())", ""),
    "a function": ("model.shifted = lambda h: h - 1.0", "", ""),
    "the default dtype": ("torch.set_default_dtype(torch.float64); dtype = torch.float32", "", ""),
}


def test_what_has_changed_is_traced_anew_and_told(kept: Path, tmp_path: Path) -> None:
    cases = [(before, change, "", EAGER) for before, change, _ in CHANGES.values()]
    found = start_all(copied(kept, tmp_path), [*cases, ("", "", "", EAGER)])
    for (name, (_, _, why)), facts in zip(CHANGES.items(), found[:-1], strict=True):
        assert facts["index"]["status"] != "hit" and why in facts["index"]["why"], (name, facts["index"])
        assert facts["counters"]["dynamo_compiles"] >= 1, name
    assert found[-1]["index"]["status"] == "hit", found[-1]["index"]


def test_an_edit_of_an_inlined_function_is_seen_and_one_beside_it_is_not(kept: Path, tmp_path: Path) -> None:
    folder = copied(kept, tmp_path)
    (folder / "model.py").write_text(MODEL + "\n\ndef unused():\n    return 1\n")
    assert start(folder, EAGER)["index"]["status"] == "hit"
    (folder / "model.py").write_text(MODEL.replace("return h + by", "return h - by"))
    facts = start(folder, EAGER)
    assert facts["index"] == {"status": "miss", "why": "the source of model has changed"}


def test_each_state_of_a_module_has_a_trace(kept: Path, tmp_path: Path) -> None:
    quarter = ("", "one.factor = 0.25", "", EAGER)
    found = start_all(copied(kept, tmp_path), [quarter, quarter, ("", "", "", EAGER)])
    assert [facts["index"]["status"] for facts in found] == ["miss", "hit", "hit"]


def test_state_that_changes_and_a_piece_that_falls_back_after_a_warm_start(kept: Path, tmp_path: Path) -> None:
    changed, fallen = start_all(
        copied(kept, tmp_path),
        [("", "", "module.factor = reference.factor = 4.0", EAGER), ("", "", "compiled.fallback(piece=0)", {})],
    )
    assert "self.factor was 0.5, and now is 4.0" in changed["stderr"] and changed["counters"]["recaptures"] == 1
    assert fallen["pieces"] == ["eager"] and fallen["counters"]["index_hits"] == 1


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete the trace", "delete an artifact"])
def test_a_damaged_trace_is_traced_anew(kept: Path, tmp_path: Path, damage: str) -> None:
    folder = copied(kept, tmp_path)
    for manifest in list((folder / "root" / "entries").rglob("manifest.json")):
        files = json.loads(manifest.read_text())["files"]
        if ("trace.pickle" in files) is (damage == "delete an artifact"):
            continue
        if damage.startswith("delete"):
            shutil.rmtree(manifest.parent)
            continue
        sha256 = files["trace.pickle"]["sha256"]
        blob = folder / "root" / "blobs" / sha256[:2] / sha256
        contents = blob.read_bytes()
        blob.write_bytes(contents[:100] if damage == "truncate" else contents[:-9] + b"x" + contents[-8:])
    facts = start(folder, {} if damage == "delete an artifact" else EAGER)
    assert facts["index"]["status"] == "miss" and facts["counters"]["dynamo_compiles"] >= 1


def test_what_cant_be_indexed_says_why(kept: Path, tmp_path: Path) -> None:
    planted = "tests.pipeline.planted_passes:SquareByProduct"
    configs = [
        ({**EAGER, "extra_passes": [planted], "passes": {"square_by_product": {"if_present": True}}}, "extra_passes"),
        ({**EAGER, "check_passes": True}, "check_passes"),
        ({"backend": "aot_eager"}, "isn't kept"),
    ]
    found = start_all(copied(kept, tmp_path), [("", "", "", config) for config, _ in configs for _ in range(2)])
    for number, facts in enumerate(found):
        assert facts["index"]["status"] == "off" and configs[number // 2][1] in facts["index"]["why"]


def test_another_configuration_has_traces_of_its_own(kept: Path, tmp_path: Path) -> None:
    folder = copied(kept, tmp_path)
    frozen = {**EAGER, "freeze": True}
    first, again, other = start_all(
        folder, [("", "", "", frozen), ("", "", "", frozen), ("", "", "", {**EAGER, "max_num_tokens": 4096})]
    )
    assert first["index"] == other["index"]
    assert first["index"]["why"] == "no trace of this code under this configuration is kept"
    assert again["index"]["status"] == "hit"
    assert start(folder, EAGER, TORCHDYNAMO_INLINE_INBUILT_NN_MODULES="1")["index"]["status"] == "miss"
    off = start(folder, EAGER, ONEGRAPH_DISABLE_COMPILE_CACHE="1")
    assert off["index"] == {"status": "off", "why": "the compile cache is off"}


def test_a_pass_that_was_hung_into_inductor_is_known(fresh_cache: Path) -> None:
    import torch
    from torch._inductor import config
    from torch._inductor.custom_graph_pass import CustomGraphPass

    import onegraph

    class Named(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            pass

        def uuid(self) -> str:
            return "named"

    class Unnamed(Named):
        def uuid(self) -> None:  # type: ignore[override]
            return None

    def index() -> tuple[str, str]:
        compiled = onegraph.compile(torch.nn.Linear(3, 3), config=EAGER)
        with torch.no_grad():
            compiled(torch.randn(2, 3))
        found = compiled.explain().index
        assert found is not None
        return found.status, found.why

    assert [index()[0] for _ in range(2)] == ["miss", "hit"]
    with config.patch({"post_grad_custom_post_pass": Named()}):
        assert [index()[0] for _ in range(2)] == ["miss", "hit"]
    with config.patch({"post_grad_custom_post_pass": Unnamed()}):
        status, why = index()
        assert status == "off" and "post_grad_custom_post_pass has no uuid()" in why


def test_objects_that_cant_be_looked_at_cost_no_more_than_the_index(fresh_cache: Path) -> None:
    import torch
    from torch import nn

    import onegraph

    class Odd:
        def __getattr__(self, name: str) -> None:
            raise ValueError(name)

    class WithOdd(nn.Module):
        odd = Odd()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    for _ in range(2):
        compiled = onegraph.compile(WithOdd(), config=EAGER)
        with torch.no_grad():
            assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 2.0))
    found = compiled.explain().index
    assert found is not None and found.status == "hit"
    lazy = onegraph.compile(nn.Sequential(nn.LazyLinear(4)), config=EAGER)
    try:
        with torch.no_grad():
            lazy(torch.randn(3, 5))
    except onegraph.errors.OnegraphError:
        return  # torch doesn't trace it
    found = lazy.explain().index
    assert found is not None and found.status == "off" and "tensors can't be told" in found.why
