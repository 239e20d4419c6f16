"""Each row of the promised table of flags parses as typed, and takes effect or is refused in words."""

from __future__ import annotations

import json
from typing import Any

import pytest

from onegraph.cli.main import main

TAKES_EFFECT = [
    (["--enforce-eager"], {"mode": "NONE", "backend": "eager", "cudagraph_mode": "NONE"}),
    (["--enforce_eager"], {"mode": "NONE"}),
    (["-O.mode=0"], {"mode": "NONE", "backend": "eager"}),
    (["-O.mode=NONE"], {"mode": "NONE"}),
    (["-O.mode=STOCK_TORCH_COMPILE"], {"mode": "STOCK_TORCH_COMPILE", "backend": "inductor"}),
    (["-O.mode=DYNAMO_TRACE_ONCE"], {"mode": "DYNAMO_TRACE_ONCE"}),
    (["-O.mode", "ONEGRAPH"], {"mode": "ONEGRAPH"}),
    (["-O.cudagraph_mode=NONE"], {"cudagraph_mode": "NONE"}),
    (["-O.cudagraph_mode=PIECEWISE"], {"cudagraph_mode": "PIECEWISE"}),
    (
        ["-O.cudagraph_mode", "FULL", "-O.cudagraph_capture_sizes=[1,2,4]", "-O.cudagraph_check=always"],
        {"cudagraph_mode": "FULL", "cudagraph_capture_sizes": [1, 2, 4], "cudagraph_check": "always"},
    ),
    (
        ["-O.cudagraph_mode=full", "-O.on_memory_change=rerecord", "-O.cudagraph_lazy", "-O.cudagraph_debug"],
        {"cudagraph_mode": "FULL", "on_memory_change": "rerecord", "cudagraph_lazy": True, "cudagraph_debug": True},
    ),
    (["-O.cudagraph-mode=NONE"], {"cudagraph_mode": "NONE"}),
    (["-O.backend=eager"], {"mode": "ONEGRAPH", "backend": "eager"}),
    (["-O.backend", "aot_eager"], {"backend": "aot_eager"}),
    (["-O.backend=inductor"], {"backend": "inductor"}),
    (["-O.eager_pieces=[0]"], {"eager_pieces": [0]}),
    (["-O.splitting_ops=[]"], {"splitting_ops": []}),
    (['-O.splitting_ops=["onegraph::paged_attention"]'], {"splitting_ops": ["onegraph::paged_attention"]}),
    (["-O.eager_pieces=[3,7]"], {"eager_pieces": [3, 7]}),
    (["-O.compile_sizes=[1,8]"], {"compile_sizes": [1, 8]}),
    (["-O.compile_ranges=[[1,8]]"], {"compile_ranges": [[1, 8]]}),
    (["-O.compile_ranges=[8,32]"], {"compile_ranges": [8, 32]}),
    (["-O.dynamic_shapes=unbacked"], {"dynamic_shapes": "unbacked"}),
    (["-O.dynamic_shapes=backed"], {"dynamic_shapes": "backed"}),
    (["-O.dynamic_shapes", "backed_size_oblivious"], {"dynamic_shapes": "backed_size_oblivious"}),
    (["-O.on_constraint=split"], {"on_constraint": "split"}),
    (["-O.compile_cache_save_format=binary"], {"compile_cache_save_format": "binary"}),
    (["-O.on_state_change=recapture"], {"on_state_change": "recapture"}),
    (["-O.on_state_change=error"], {"on_state_change": "error"}),
    (["-O.freeze=true"], {"freeze": True}),
    (["-O.on_constraint=error"], {"on_constraint": "error"}),
    (["-O.freeze=false"], {"freeze": False}),
    (["-O0"], {"level": 0, "mode": "NONE", "backend": "eager"}),
    (["-O1"], {"level": 1, "mode": "DYNAMO_TRACE_ONCE", "backend": "inductor"}),
    (["-O=2"], {"level": 2, "mode": "ONEGRAPH", "backend": "inductor"}),
    (["-O3"], {"level": 3, "autotune": "record", "inductor_compile_config": {"max_autotune": True}}),
    (["-O.autotune=record"], {"autotune": "record", "inductor_compile_config": {"max_autotune": True}}),
    (["-O.autotune=replay"], {"autotune": "replay", "inductor_compile_config": {"max_autotune": True}}),
    (["-O3", "-O.autotune=off"], {"autotune": "off", "inductor_compile_config": {}}),
    (["-O.inductor_compile_config.max_autotune_gemm=true"], {"autotune": "record"}),
    (["-O", '{"level": 1, "backend": "eager"}'], {"level": 1, "backend": "eager"}),
    (["--compilation_config", '{"backend": "eager"}'], {"backend": "eager"}),
    (["--compilation-config=1"], {"level": 1}),
    (
        ["-O.inductor_compile_config.max_autotune=true", "-O.inductor_compile_config.cpp.threads=2"],
        {"inductor_compile_config": {"max_autotune": True, "cpp.threads": 2}},
    ),
    (["-O.compile_cache_save_format=unpacked"], {"compile_cache_save_format": "unpacked"}),
]
REFUSED = [
    (["-O.passes.merge_linear=false"], "did you mean 'merge_linears'"),
    (['-O.passes.merge_linears={"mots": 4}'], "did you mean 'most'"),
    (["-O.passes.merge_linears=3"], "it takes true, false, or its options"),
    (['-O.extra_passes=["no_such_module:Class"]'], "can't be imported: ModuleNotFoundError"),
    (['-O.extra_passes=["onegraph.errors:ConfigError"]'], "is no pass"),
    (['-O.extra_passes=["not_installed"]'], "no entry point of onegraph.passes"),
    (["-O0", "-O.passes.merge_linears=true"], "captures no graph"),
    (["--enforce-eager", "-O.check_passes"], "captures no graph"),
    (["-O1", "-O.compile_sizes=cudagraph_capture_sizes"], "no sizes are recorded"),
    (["-O1", "-O.cudagraph_capture_sizes=[1,2,4]"], "nothing is recorded"),
    (["-O1", "-O.cudagraph_check=always"], "nothing is recorded"),
    (["-O1", "-O.on_memory_change=rerecord"], "nothing is recorded"),
    (["-O1", "-O.cudagraph_lazy"], "nothing is recorded"),
    (["-O1", "-O.cudagraph_debug"], "nothing is recorded"),
    (["-O.cudagraph_capture_sizes=[1]", "-O.cudagraph_memory_mib=8"], "is there to choose"),
    (['-O.cudagraph_traffic={"one": 1}'], "an object with sizes as keys"),
    (["-O1", "-O.cudagraph_padding.x=zero"], "nothing is recorded"),
    (["-O.cudagraph_mode=FULL", "-O.cudagraph_padding.x=zeros"], "did you mean 'zero'"),
    (["-O.mode=0", "-O.cudagraph_mode=FULL"], "captures no graph"),
    (["--enforce-eager", "-O.cudagraph_mode=PIECEWISE"], "contradicts"),
    (["--tensor-parallel-size=2"], "one device"),
    (["-O.autotune=record", "-O.backend=eager"], "autotune=record (user) contradicts backend=eager"),
    (["-O.autotune=replay", "-O.mode=STOCK_TORCH_COMPILE"], "contradicts mode=STOCK_TORCH_COMPILE"),
    (["-O.autotune=off", "-O.inductor_compile_config.max_autotune=true"], "contradicts max_autotune"),
]
UNKNOWN = [
    (["--enforce-eagr"], "'--enforce-eager'"),
    (["-O.backendd=eager"], "'backend'"),
    (["-O.backend=eagr"], "'eager'"),
    (["-O.autotune=recrd"], "'record'"),
    (["-O.mode=ONEGRAF"], "'ONEGRAPH'"),
    (["-O.cudagraph_mode=PIECE_WISE"], "'PIECEWISE'"),
    (["-O", '{"backendd": "eager"}'], "'backend'"),
]


def spelled(words: list[str]) -> str:
    return " ".join(words)


@pytest.mark.parametrize(("words", "effective"), TAKES_EFFECT, ids=lambda v: spelled(v) if isinstance(v, list) else "")
def test_a_flag_that_takes_effect(
    words: list[str], effective: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", *words, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert {name: facts[name]["value"] for name in effective} == effective


@pytest.mark.parametrize(("words", "told"), REFUSED, ids=lambda v: spelled(v) if isinstance(v, list) else "")
def test_a_flag_that_this_version_refuses(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", *words, "--json"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert told in shown.err


@pytest.mark.parametrize("command", ["run", "serve", "explain", "config"])
@pytest.mark.parametrize(("words", "nearest"), UNKNOWN, ids=lambda v: spelled(v) if isinstance(v, list) else "")
def test_what_is_unknown_is_refused_with_the_nearest(
    command: str, words: list[str], nearest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, *words]) == 2
    assert f"did you mean {nearest}?" in capsys.readouterr().err


def test_an_unknown_option_of_inductor_is_refused_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "-O.inductor_compile_config.max_autotun=true"]) == 2
    assert "did you mean 'max_autotune'?" in capsys.readouterr().err


def test_a_setting_says_why_it_has_its_value(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONEGRAPH_COMPILATION_CONFIG", '{"backend": "aot_eager"}')
    assert main(["config", "-O1", "-O.backend=eager", "--max-num-seqs=4", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["backend"] == {"value": "aot_eager", "why": "ONEGRAPH_COMPILATION_CONFIG"}
    assert facts["level"] == {"value": 1, "why": "user"}
    assert facts["mode"] == {"value": "DYNAMO_TRACE_ONCE", "why": "level -O1"}
    assert facts["cudagraph_lazy"] == {"value": False, "why": "default"}
    assert facts["max_num_seqs"] == {"value": 4, "why": "user"}
    assert facts["block_size"] == {"value": 16, "why": "default"}


def test_the_table_has_a_line_for_each_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--json"]) == 0
    names = list(json.loads(capsys.readouterr().out))
    assert main(["config"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == names
