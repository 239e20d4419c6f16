"""Passes from outside: chosen, switched off, given options, added by users, checked, counted, explained."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.export import Dim

import onegraph
from onegraph.build import build
from onegraph.build_call import BuildCall
from onegraph.counters import counters
from onegraph.errors import CompileError, ConfigError

PLANTED = "tests.pipeline.planted_passes"
SQUARE, SINE = f"{PLANTED}:SquareByProduct", f"{PLANTED}:AddToSine"


class Attention(torch.nn.Module):
    """Three projections of one input, with biases, and one of another input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = torch.nn.Linear(16, 32), torch.nn.Linear(16, 8), torch.nn.Linear(16, 8)
        self.o = torch.nn.Linear(48, 16, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o(torch.cat([self.q(x).sin(), self.k(x).pow(2), self.v(x)], -1))


def compiled(module: Any, config: Any, **settings: Any) -> Any:
    shapes = {"x": {0: Dim("T", max=64)}}
    return onegraph.compile(module, dynamic_shapes=shapes, config=config, own_weights=True, **settings)


def rewrites(model: Any) -> dict[str, int]:
    return {one["name"]: one["rewrites"] for one in model.explain().to_dict()["passes"] if one["skipped"] is None}


def run(config: Any, tokens: int = 5) -> Any:
    module = Attention().eval()
    model = compiled(module, config)
    x = torch.randn(tokens, 16)
    with torch.no_grad():
        wanted = module(x)
        for size in (tokens, 1, 64):
            part = torch.randn(size, 16)
            torch.testing.assert_close(model(x=part), module(part))
        torch.testing.assert_close(model(x=x), wanted)
    return model


def test_each_pass_counts_its_rewrites_for_each_piece() -> None:
    model = run({"backend": "eager", "check_passes": True})
    assert rewrites(model)["merge_linears"] == 1
    facts = model.explain().to_dict()
    assert facts["pieces"][0]["passes"]["merge_linears"] == 1
    assert [one["name"] for one in facts["stages"]].index("passes") == 2
    assert "merge_linears 1" in str(model.explain())


@pytest.mark.parametrize("name", ["merge_linears", "select_linear_kernels"])
def test_one_pass_is_switched_off_alone(name: str) -> None:
    model = run({"backend": "eager", "passes": {name: False}})
    assert name not in rewrites(model)
    assert len(rewrites(model)) == len(rewrites(run({"backend": "eager"}))) - 1


def test_an_option_changes_what_a_pass_does() -> None:
    model = run({"backend": "eager", "passes": {"merge_linears": {"most": 2}}})
    assert rewrites(model)["merge_linears"] == 1
    merged = next(name for name in model.explain().plan_source.split() if name.startswith("merged_"))
    assert merged.rstrip(",)]").count("_") == 2, "two weights"


def test_levels_have_their_passes() -> None:
    assert "merge_linears" not in rewrites(run({"level": 1, "backend": "eager"}))
    assert "merge_linears" in rewrites(run({"level": 3, "backend": "eager", "autotune": "off"}))


def test_asking_for_a_pass_that_matches_nowhere_is_an_error() -> None:
    class Lonely(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.pow(3)

    for config in ({"passes": {"merge_linears": True}}, {"extra_passes": [SQUARE]}):
        with pytest.raises(ConfigError, match="matches nowhere") as caught:
            compiled(Lonely(), {"backend": "eager", **config}).warm_up({"x": torch.randn(3, 4)})
        assert "if_present" in str(caught.value)
    assert "nearly: the power is 3" in str(caught.value)
    assert "test_passes.py" in str(caught.value), "the user's line"
    accepted = compiled(
        Lonely(),
        {"backend": "eager", "extra_passes": [SQUARE], "passes": {"square_by_product": {"if_present": True}}},
    )
    assert torch.equal(accepted(x=torch.ones(3, 4)), torch.ones(3, 4))


def test_passes_of_users_run_and_are_counted() -> None:
    model = run({"extra_passes": [SQUARE], "check_passes": True})
    assert rewrites(model)["square_by_product"] == 1
    assert next(iter(rewrites(model))) == "square_by_product", "they see the model's own operations"


def test_the_parameters_of_a_pass_are_in_the_key_through_what_they_produce() -> None:
    def keys(by: float) -> tuple[Any, ...]:
        model = compiled(Attention().eval(), {"extra_passes": [SINE], "passes": {"add_to_sine": {"by": by}}})
        model.warm_up({"x": torch.randn(3, 16)})
        return tuple(one.key for piece in model.explain().pieces for one in piece.ranges)

    assert keys(0.5) == keys(0.5) != keys(0.25)
    with counters.expect(store_hits=1, store_misses=0):
        keys(0.25)


def test_a_pass_that_rewrites_nothing_leaves_the_artifact_as_it_is() -> None:
    def key(config: Any) -> Any:
        model = onegraph.compile(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()), config=config)
        model.warm_up(None, torch.randn(3, 4))
        return model.explain().pieces[0].ranges[0].key

    given = {"extra_passes": [SQUARE], "passes": {"square_by_product": {"if_present": True}}}
    assert key({}) == key(given)


def test_a_wrong_pass_is_found_by_checking() -> None:
    config = {"backend": "eager", "extra_passes": [SINE], "passes": {"add_to_sine": {"by": 0.01}}}
    compiled(Attention(), config).warm_up({"x": torch.randn(3, 16)})
    with pytest.raises(CompileError, match="add_to_sine changes what piece 0 computes") as caught:
        compiled(Attention(), {**config, "check_passes": True}).warm_up({"x": torch.randn(3, 16)})
    assert "-O.passes.add_to_sine=false" in str(caught.value)


def test_a_pass_that_raises_is_named() -> None:
    with pytest.raises(CompileError, match="the pass raises failed: ZeroDivisionError: planted") as caught:
        compiled(Attention(), {"extra_passes": [f"{PLANTED}:Raises"]}).warm_up({"x": torch.randn(3, 16)})
    assert "-O.passes.raises=false" in str(caught.value)
    off = {"extra_passes": [f"{PLANTED}:Raises"], "passes": {"raises": False}, "backend": "eager"}
    compiled(Attention(), off).warm_up({"x": torch.randn(3, 16)})


def test_what_a_pass_requires_of_the_target() -> None:
    config = {"backend": "eager", "extra_passes": [f"{PLANTED}:NeedsWings"]}
    with pytest.raises(ConfigError, match="the target has no wings"):
        compiled(Attention(), config).warm_up({"x": torch.randn(3, 16)})
    model = compiled(Attention(), {**config, "passes": {"needs_wings": {"if_present": True}}})
    model.warm_up({"x": torch.randn(3, 16)})
    assert "needs_wings the target has no wings" in str(model.explain())


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"passes": {"merge_linear": False}}, "did you mean 'merge_linears'"),
        ({"passes": {"merge_linears": {"mots": 2}}}, "did you mean 'most'"),
        ({"passes": {"merge_linears": "yes"}}, "true, false, or its options"),
        ({"extra_passes": ["no.such.module:Class"]}, "can't be imported: ModuleNotFoundError"),
        ({"extra_passes": [f"{PLANTED}:Missing"]}, "can't be imported: AttributeError"),
        ({"extra_passes": [f"{PLANTED}:NoDataclass"]}, "is no pass"),
        ({"extra_passes": ["not_installed"]}, "no entry point"),
        ({"extra_passes": [SQUARE, SQUARE]}, "two passes of the name 'square_by_product'"),
        ({"extra_passes": [SINE], "passes": {"add_to_sine": {"bye": 1}}}, "did you mean 'by'"),
        ({"mode": 0, "extra_passes": [SQUARE]}, "captures no graph"),
        ({"mode": "STOCK_TORCH_COMPILE", "passes": {"merge_linears": False}}, "captures no graph"),
    ],
    ids=str,
)
def test_what_is_wrong_is_refused_before_anything_is_captured(config: Any, told: str) -> None:
    with counters.expect(graphs_captured=0), pytest.raises(ConfigError) as caught:
        onegraph.compile(Attention(), config=config)
    assert told in str(caught.value)


def test_a_pass_of_an_installed_package(tmp_path: Path) -> None:
    info = tmp_path / "planted-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: planted\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[onegraph.passes]\nsquares = {SQUARE}\n")
    script = (
        "import torch, onegraph\n"
        "m = onegraph.compile(lambda x: x.pow(2), config={'backend': 'eager', 'extra_passes': ['squares']})\n"
        "m(torch.ones(2)); print(m.explain().passes[0].name, m.explain().passes[0].rewrites)\n"
    )
    path = f"{tmp_path}:{Path(__file__).parents[2]}"
    found = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": path, "PATH": "/usr/bin:/bin"},
    )
    assert found.stdout.strip() == "square_by_product 1", found.stderr


@pytest.mark.parametrize("fuel", [0, 1, 2, None])
def test_fuel_stops_the_passes_and_an_observer_sees_them(fuel: int | None) -> None:
    from onegraph.config.compilation import CompilationConfig
    from onegraph.config.resolve import resolve
    from onegraph.env import environment
    from onegraph.targets import device_rules, target_for

    given = {"backend": "eager", "extra_passes": [SQUARE], "passes": {"square_by_product": {"if_present": True}}}
    config = resolve(CompilationConfig.of(given), rules=device_rules("cpu"), environment=environment())
    seen: list[tuple[int, str]] = []
    built = build(
        BuildCall(
            module=Attention().eval(),
            args=(torch.randn(3, 16),),
            kwargs={},
            name="attention",
            dynamic_shapes=None,
            config=config,
            target=target_for("cpu"),
            store=None,
            fuel=fuel,
            pass_observer=lambda piece, name, graph_module: seen.append((piece, name)),
        )
    )
    total = sum(one.rewrites for one in built.explanation.passes)
    assert total == fuel if fuel is not None else total > 2
    assert seen[0] == (0, "")
    assert [name for _, name in seen[1:]] == [one.name for one in built.explanation.passes if one.rewrites]


def test_a_piece_falls_back_to_the_graph_that_was_captured() -> None:
    module = Attention().eval()
    model = compiled(module, {"extra_passes": [SINE], "passes": {"add_to_sine": {"by": 1.0}}})
    x = torch.randn(5, 16)
    with torch.no_grad():
        wanted = module(x)
        assert not torch.allclose(model(x=x), wanted), "the wrong pass is in what runs"
        model.fallback(0)
        torch.testing.assert_close(model(x=x), wanted)
        alone = compiled(module, {"extra_passes": [SINE], "passes": {"add_to_sine": {"by": 1.0, "if_present": True}},
                                  "eager_pieces": [0]})  # fmt: skip
        torch.testing.assert_close(alone(x=x), wanted)
    assert alone.explain().to_dict()["pieces"][0]["passes"] == {}


def test_outputs_keep_their_layout() -> None:
    class Columns(torch.nn.Module):
        """Its outputs are columns of one merged result, if nobody lays them out again."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = torch.nn.Linear(8, 4), torch.nn.Linear(8, 6)

        def forward(self, x: torch.Tensor) -> Any:
            return self.a(x), self.b(x).t()

    module = Columns().eval()
    for config in ({"backend": "eager"}, {}):
        model = compiled(module, config)
        with torch.no_grad():
            for size in (1, 5):
                x = torch.randn(size, 8)
                for found, wanted in zip(model(x=x), module(x), strict=True):
                    assert found.stride() == wanted.stride()
                    torch.testing.assert_close(found, wanted)
        assert rewrites(model)["merge_linears"] == 1


def test_passes_run_below_torch_compile() -> None:
    module = Attention().eval()
    model = torch.compile(
        module, backend="onegraph", options={"extra_passes": [SINE], "passes": {"add_to_sine": {"by": 1}}}
    )
    x = torch.randn(3, 16)
    with torch.no_grad():
        assert not torch.allclose(model(x), module(x)), "the planted pass ran"
    torch._dynamo.reset()


def test_explain_tells_passes_on_the_command_line() -> None:
    words = [sys.executable, "-m", "onegraph.cli.main", "explain", "--passes", "-O.backend=eager"]
    text = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert "\nmerge_linears: " in text
    assert " rewrites in " in text
    assert "in 5 pieces" in text
    facts = json.loads(subprocess.run([*words, "--json"], capture_output=True, text=True, check=True).stdout)
    one = next(one for one in facts["passes"] if one["name"] == "merge_linears")
    assert one["rewrites"] > 0
    assert set(one) == {"name", "rewrites", "pieces", "seconds", "skipped", "near_misses"}


def test_config_shows_the_passes_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    from onegraph.cli.main import main

    assert main(["config", "-O.passes.merge_linears=false", f'-O.extra_passes=["{SQUARE}"]', "--json"]) == 0
    names = json.loads(capsys.readouterr().out)["passes_run"]["value"]
    assert names[0] == "square_by_product"
    assert "merge_linears" not in names
    assert "select_linear_kernels" in names


def test_the_example_in_the_docs_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs/passes.md").read_text()
    (tmp_path / "mypasses.py").write_text(page.split("```python\n")[1].split("```")[0])
    monkeypatch.syspath_prepend(tmp_path)
    model = run({"backend": "eager", "extra_passes": ["mypasses:SquareByProduct"], "check_passes": True})
    assert rewrites(model)["square_by_product"] == 1
    config = {"extra_passes": ["mypasses:SquareByProduct"], "passes": {"square_by_product": {"most": 0}}}
    with pytest.raises(ConfigError, match="matches nowhere"):
        run({"backend": "eager", **config})


class Cast(torch.nn.Module):
    """A layer under autocast, and one outside of it with the same input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = torch.nn.Linear(16, 8), torch.nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = self.a(x)
        return inside, self.b(x)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("ambient", [False, True])
def test_no_pass_runs_under_autocast(backend: str, ambient: bool) -> None:
    module = Cast().eval()
    model = compiled(module, {"backend": backend})
    x = torch.randn(5, 16)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=ambient):
        for found, wanted in zip(model(x=x), module(x), strict=True):
            assert found.dtype == wanted.dtype
            torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02)
    assert not torch.is_autocast_enabled("cpu")
    assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    assert {one["skipped"] for one in model.explain().to_dict()["passes"]} == {"autocast chooses the dtypes of calls"}


def test_transforms_of_torch_func_below_torch_compile() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return torch.vmap(lambda row: (row * 2).sum())(x)

    x = torch.randn(5, 4)
    torch.testing.assert_close(torch.compile(function, backend="onegraph")(x), function(x))
    torch._dynamo.reset()


def test_equal_pieces_of_other_dims_have_their_own_sizes() -> None:
    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        def both(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return (a * 1.5).sum() * (b - 1)

        first = torch.relu(both(x, y))
        return torch.relu(both(first, x))

    model = onegraph.compile(
        function,
        dynamic_shapes={"x": {0: Dim("A", max=64)}, "y": {0: Dim("B", max=64)}},
        config={"splitting_ops": ["torch.relu"], "compile_sizes": [16]},
    )
    for a, b in ((16, 7), (7, 16), (16, 16), (3, 5)):
        x, y = torch.randn(a), torch.randn(b)
        torch.testing.assert_close(model(x, y), function(x, y))


class Reads(torch.nn.Module):
    """Its first result's strides are read."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Linear(16, 8), torch.nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> Any:
        a = self.a(x)
        return a.as_strided((2, 8), (8, 1)), self.b(x)


def test_layers_whose_strides_are_read_stay_apart() -> None:
    module = Reads().eval()
    model = compiled(module, {"backend": "eager"})
    x = torch.randn(5, 16)
    with torch.no_grad():
        torch.testing.assert_close(model(x=x), module(x))
    assert "strides of a layer's result are read" in model.explain().passes_text


def test_merged_layers_of_a_vector_give_results_apart() -> None:
    class Vector(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = torch.nn.Linear(8, 4), torch.nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> Any:
            return self.a(x), self.b(x)

    model = onegraph.compile(Vector().eval(), config={"backend": "eager"}, own_weights=True)
    with torch.no_grad():
        a, b = model(torch.randn(8))
    assert rewrites(model)["merge_linears"] == 1
    assert a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr()


@pytest.mark.parametrize("what", ["adds", "removes", "none", "silent"])
def test_a_pass_that_breaks_its_contract_is_named(what: str) -> None:
    config = {
        "backend": "eager",
        "check_passes": True,
        "extra_passes": [f"{PLANTED}:Breaks"],
        "passes": {"breaks": {"what": what, "if_present": True}},
    }
    with pytest.raises(CompileError, match="the pass breaks failed: TypeError"):
        compiled(Attention(), config).warm_up({"x": torch.randn(3, 16)})


@pytest.mark.parametrize("most", [0, 1, -1, 2.5, "two", None])
def test_most_is_a_number_of_layers(most: Any) -> None:
    with pytest.raises(ConfigError, match="2 or more"):
        onegraph.compile(Attention(), config={"passes": {"merge_linears": {"most": most}}})


def test_a_piece_that_refuses_sample_data_is_left_unchecked_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    def function(x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        starts = torch.tensor([0, 3], dtype=torch.int32)
        tables = torch.zeros(1, 1, dtype=torch.int32)
        cache = torch.zeros(1, 4, 1, 4)
        out: torch.Tensor = torch.ops.onegraph.paged_attention(
            x[:, None].pow(2), cache, cache, tables, starts, lengths, 1.0, None, None, None
        )
        return out

    config = {"backend": "eager", "splitting_ops": [], "extra_passes": [SQUARE], "check_passes": True}
    model = onegraph.compile(function, config=config)
    x, lengths = torch.randn(3, 4), torch.tensor([3], dtype=torch.int32)
    with counters.expect(passes_unchecked=1):
        torch.testing.assert_close(model(x, lengths), function(x, lengths))
    assert "can't be run on sample data, so square_by_product isn't checked" in caplog.text


def test_a_graph_whose_only_inputs_are_sizes() -> None:
    class Counts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step = 1

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.arange(x.shape[0]) * self.step * 1

    module = Counts()
    model = onegraph.compile(module, dynamic_shapes={"x": {0: Dim("T", max=64)}}, config={"backend": "aot_eager"})
    for size in (1, 5):
        assert torch.equal(model(torch.randn(size, 2)), module(torch.randn(size, 2)))


def test_tensors_without_data_are_no_question_of_autocast() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return x.pow(2) * torch.empty(3, device="meta").shape[0]

    model = onegraph.compile(function, config={"backend": "eager"})
    x = torch.randn(4)
    torch.testing.assert_close(model(x), function(x))
