"""The promised table of flags, row by row: all spellings and Python say the same, and counters prove what runs."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from onegraph import LLM, CompilationConfig, CompilationMode, CUDAGraphMode, SamplingParams
from onegraph.cli import serve
from onegraph.cli.main import main
from onegraph.config.compilation import FIELDS
from onegraph.config.resolve import resolve
from onegraph.counters import counters
from onegraph.env import environment
from onegraph.errors import ConfigError
from onegraph.serve.server import Server
from onegraph.targets import device_rules
from tests.architectures import make_model
from tests.serve.live_server import Live, process

pytestmark = pytest.mark.usefixtures("op_kernels")

ACCEPTED: list[tuple[str, Any]] = [
    ("level", 0),
    ("level", 1),
    ("level", 2),
    ("level", 3),
    ("mode", "NONE"),
    ("mode", 0),
    ("mode", "STOCK_TORCH_COMPILE"),
    ("mode", 2),
    ("mode", "ONEGRAPH"),
    ("backend", "eager"),
    ("backend", "aot_eager"),
    ("backend", "inductor"),
    ("splitting_ops", []),
    ("splitting_ops", ["onegraph::paged_attention"]),
    ("passes", {}),
    ("passes", {"merge_linears": False}),
    ("passes", {"merge_linears": {"most": 4, "if_present": True}}),
    ("extra_passes", []),
    ("check_passes", True),
    ("check_passes", False),
    ("eager_pieces", [0]),
    ("compile_sizes", []),
    ("compile_sizes", [1, 8]),
    ("compile_ranges", []),
    ("compile_ranges", [8, 32]),
    ("compile_ranges", [[1, 8]]),
    ("cudagraph_mode", "NONE"),
    ("cudagraph_mode", "PIECEWISE"),
    ("cudagraph_mode", "FULL"),
    ("cudagraph_mode", "FULL_DECODE_ONLY"),
    ("cudagraph_mode", "FULL_AND_PIECEWISE"),
    ("cudagraph_capture_sizes", []),
    ("cudagraph_capture_sizes", [1, 2, 4]),
    ("cudagraph_traffic", {}),
    ("cudagraph_traffic", {"3": 100}),
    ("cudagraph_memory_mib", 0),
    ("cudagraph_memory_mib", 512),
    ("cudagraph_check", "first"),
    ("cudagraph_check", "always"),
    ("cudagraph_lazy", False),
    ("cudagraph_lazy", True),
    ("cudagraph_debug", False),
    ("cudagraph_debug", True),
    ("cudagraph_padding", {}),
    ("on_memory_change", "error"),
    ("on_memory_change", "rerecord"),
    ("dynamic_shapes", "unbacked"),
    ("dynamic_shapes", "backed"),
    ("dynamic_shapes", "backed_size_oblivious"),
    ("on_constraint", "error"),
    ("on_constraint", "split"),
    ("on_state_change", "recapture"),
    ("on_state_change", "error"),
    ("freeze", False),
    ("freeze", True),
    ("plan_memory", True),
    ("plan_memory", False),
    ("compile_cache_save_format", "binary"),
    ("compile_cache_save_format", "unpacked"),
    ("inductor_compile_config", {}),
    ("autotune", "record"),
    ("autotune", "replay"),
    ("autotune", "off"),
    ("max_num_tokens", 64),
]
REFUSED_AT_O1: list[tuple[str, Any]] = [
    ("cudagraph_capture_sizes", [1, 2, 4]),
    ("cudagraph_traffic", {"1": 900}),
    ("cudagraph_memory_mib", 512),
    ("cudagraph_check", "always"),
    ("cudagraph_lazy", True),
    ("cudagraph_debug", True),
    ("cudagraph_padding", {"x": "zero"}),
    ("on_memory_change", "rerecord"),
]
UNCOMPILED = {"dynamo_compiles": 0, "graphs_captured": 0, "aot_compiles": 0, "inductor_compiles": 0, "gxx_runs": 0}
CAPTURED = {"dynamo_compiles": 1, "graphs_captured": 1, "aot_compiles": 0, "inductor_compiles": 0, "gxx_runs": 0}


def spellings(name: str, value: Any) -> Iterator[list[str]]:
    """Every way of writing one setting on a command line."""
    text, whole = json.dumps(value), json.dumps({name: value})
    dashed = name.replace("_", "-")
    yield [f"-O.{name}={text}"]
    yield [f"-O.{dashed}={text}"]
    yield [f"-O.{name}", text]
    yield ["-O", whole]
    yield [f"-O={whole}"]
    yield ["--compilation_config", whole]
    yield [f"--compilation-config={whole}"]
    if isinstance(value, str):
        yield [f"-O.{name}={value}"]
        yield [f"-O.{dashed}", value]
    if name == "level":
        yield [f"-O{value}"]
        yield [f"-O={value}"]
        yield [f"--compilation-config={value}"]
    if isinstance(value, dict):
        for key, item in value.items():
            yield [f"-O.{name}.{key}={json.dumps(item)}"]
            yield [f"-O.{dashed}.{key}", json.dumps(item)]
    if value is True:
        yield [f"-O.{name}"]


def in_python(fields: Any, *, enforce_eager: bool = False) -> dict[str, Any]:
    return resolve(
        CompilationConfig.of(fields),
        rules=device_rules("cpu", batches=True),
        environment=environment(),
        enforce_eager=enforce_eager,
    ).to_dict()


def on_the_command_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["config", *words, "--json"]) == 0, (words, capsys.readouterr().err)
    facts = json.loads(capsys.readouterr().out)
    return {name: facts[name] for name in FIELDS}


def test_each_field_has_a_row() -> None:
    assert {name for name, _ in ACCEPTED} == set(FIELDS)


@pytest.mark.parametrize(("name", "value"), ACCEPTED)
def test_all_spellings_and_python_give_the_same(name: str, value: Any, capsys: pytest.CaptureFixture[str]) -> None:
    expected = in_python({name: value})
    if name != "inductor_compile_config":  # with -O3 alone it isn't the user's
        assert expected[name]["why"] == "user"
    for words in spellings(name, value):
        assert on_the_command_line(words, capsys) == expected, words


@pytest.mark.parametrize(("name", "value"), REFUSED_AT_O1)
def test_all_spellings_and_python_are_refused_with_the_same_words(
    name: str, value: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match="nothing is recorded") as caught:
        in_python({"level": 1, name: value})
    for words in spellings(name, value):
        assert main(["config", "-O1", *words, "--json"]) == 2, words
        shown = capsys.readouterr()
        assert str(caught.value) in shown.err, words
        assert shown.out == ""


@pytest.mark.parametrize(("name", "value"), REFUSED_AT_O1)
def test_what_is_refused_stops_an_llm_before_it_compiles(name: str, value: Any, model_folder: Path) -> None:
    with counters.expect(graphs_captured=0), pytest.raises(ConfigError, match="nothing is recorded"):
        LLM(str(model_folder), compilation_config={"level": 1, name: value}, num_kv_blocks=16)


@pytest.mark.parametrize("words", [["--enforce-eager"], ["--enforce_eager"], ["-O3", "--enforce-eager"]])
def test_enforce_eager_is_no_field_but_a_flag(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    level = {"level": 3} if "-O3" in words else {}
    assert on_the_command_line(words, capsys) == in_python(level, enforce_eager=True)


def test_enumerations_are_taken_as_themselves() -> None:
    given = CompilationConfig(mode=CompilationMode.NONE, cudagraph_mode=CUDAGraphMode.NONE)
    assert given == CompilationConfig.of({"mode": "NONE", "cudagraph_mode": "NONE"})
    assert given == CompilationConfig.of({"mode": 0, "cudagraph_mode": "none"})


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The matrices are too small to share."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("models") / "llama")


def tokens_of(model_folder: Path, **settings: Any) -> list[list[int]]:
    """Batches of several sizes, so that a graph for one size would be counted more than once."""
    llm = LLM(str(model_folder), num_kv_blocks=64, **settings)
    greedy = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    calls = (["ab"], ["abcdefg", "x", "the middle"])
    return [list(out.outputs[0].token_ids) for prompts in calls for out in llm.generate(prompts, greedy, False)]


@pytest.fixture(scope="module")
def eager_tokens(model_folder: Path) -> list[list[int]]:
    with counters.expect(**UNCOMPILED):
        return tokens_of(model_folder, enforce_eager=True)


@pytest.mark.parametrize(
    ("config", "counted"),
    [
        (0, UNCOMPILED),
        ({"mode": 0}, UNCOMPILED),
        ({"mode": "NONE", "cudagraph_mode": "NONE"}, UNCOMPILED),
        ({"backend": "eager"}, CAPTURED),
        ({"backend": "eager", "level": 1}, CAPTURED),
        ({"backend": "eager", "cudagraph_mode": "NONE"}, CAPTURED),
        ({"eager_pieces": [0, 2, 4]}, CAPTURED),
        ({"eager_pieces": [0], "splitting_ops": []}, CAPTURED),
        ({"backend": "aot_eager"}, {**CAPTURED, "aot_compiles": 3}),
        ({"backend": "aot_eager", "splitting_ops": []}, {**CAPTURED, "aot_compiles": 1}),
        ({"backend": "aot_eager", "compile_sizes": [1, 2]}, {**CAPTURED, "aot_compiles": 9}),
        ({"backend": "aot_eager", "compile_ranges": [1]}, {**CAPTURED, "aot_compiles": 6}),
        ({"mode": "STOCK_TORCH_COMPILE", "backend": "eager"}, UNCOMPILED),  # plain torch.compile, none of ours
    ],
    ids=str,
)
def test_what_runs_without_inductor(
    config: Any, counted: dict[str, int], model_folder: Path, eager_tokens: list[list[int]]
) -> None:
    with counters.expect(**counted):
        assert tokens_of(model_folder, compilation_config=config) == eager_tokens


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_an_llm_leaves_the_process_as_it_was(backend: str, model_folder: Path) -> None:
    def state() -> list[Any]:
        return [
            dict(os.environ),
            os.getcwd(),
            torch.get_num_threads(),
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            torch.get_float32_matmul_precision(),
            torch.get_rng_state().tolist(),
            random.getstate(),
            logging.getLogger().handlers,
            signal.getsignal(signal.SIGINT),
        ]

    before = state()
    tokens_of(model_folder, compilation_config={"backend": backend})
    assert state() == before


def test_stock_mode_is_torch_compile(model_folder: Path) -> None:
    from torch._dynamo.utils import counters as torchs

    torch._dynamo.reset()  # what an instance of the same class left would be taken up again
    torchs.clear()
    tokens_of(model_folder, compilation_config={"mode": "STOCK_TORCH_COMPILE", "backend": "eager"})
    assert torchs["stats"]["unique_graphs"] > 0


@pytest.mark.parametrize(("level", "pieces"), [(1, 1), (2, 3), (3, 3)])
def test_levels_that_compile_make_artifacts_and_then_load_them(
    level: int, pieces: int, model_folder: Path, eager_tokens: list[list[int]], fresh_cache: Path
) -> None:
    made = ("inductor_compiles", "store_misses", "store_writes")
    cold = {**CAPTURED, **dict.fromkeys(made, pieces), "gxx_runs": 1, "store_hits": 0, "autotune_benchmarks": 0}
    cold["store_writes"] += 1  # the trace
    with counters.expect(**cold):
        assert tokens_of(model_folder, compilation_config=level) == eager_tokens
    with counters.expect(**{**UNCOMPILED, "store_hits": pieces, "store_misses": 0}):
        assert tokens_of(model_folder, compilation_config={"level": level}) == eager_tokens


def groups_of_rows() -> list[dict[str, Any]]:
    """The accepted rows in as few configurations as hold all of them; nothing in one contradicts another."""
    groups: list[dict[str, Any]] = [{"backend": "eager"}]
    for name, value in ACCEPTED:
        fitting = (group for group in groups if name not in group and agree({**group, name: value}))
        group = next(fitting, None)
        if group is None:
            alone = {name: value}
            group = {"backend": "eager", **alone}
            groups.append(group if agree(group) else alone)
        else:
            group[name] = value
    return groups


def agree(fields: dict[str, Any]) -> bool:
    unsplit = fields.get("mode") not in (None, 3, "ONEGRAPH") or fields.get("level") in (0, 1)
    if (unsplit or fields.get("splitting_ops") == []) and "PIECEWISE" in fields.get("cudagraph_mode", ""):
        return False  # the only piece has attention, whose sizes are several
    try:
        in_python(fields)
    except ConfigError:
        return False
    return True


GROUPS = groups_of_rows()


def test_the_groups_have_every_row() -> None:
    assert all(any(group.get(name, ...) == value for group in GROUPS) for name, value in ACCEPTED)


def words_of(group: dict[str, Any]) -> list[str]:
    return [f"-O.{name}={json.dumps(value)}" for name, value in group.items()]


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: ",".join(f"{k}={v}" for k, v in group.items())[:60])
def test_run_llm_and_a_live_server_say_what_is_in_effect(
    group: dict[str, Any], model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = in_python(group)
    words = [str(model_folder), "--num-kv-blocks=64", "--max-num-batched-tokens=64", *words_of(group)]
    assert main(["run", *words, "--json", "--max-tokens=1"]) == 0
    assert json.loads(capsys.readouterr().out)["explain"]["config"] == expected
    llm = LLM(str(model_folder), num_kv_blocks=64, max_num_batched_tokens=64, compilation_config=group)
    assert llm.explain().to_dict()["config"] == expected
    assert of_a_live_server(words) == expected
    for name, value in group.items():
        shown = expected[name]["value"]
        if not isinstance(value, dict):
            assert shown == (value if name != "mode" else CompilationConfig.of({"mode": value}).mode.name)


@pytest.mark.parametrize("words", [["--enforce-eager"], ["--enforce_eager"], ["-O3", "--enforce-eager"]])
def test_a_live_server_shows_enforce_eager(words: list[str], model_folder: Path) -> None:
    level = {"level": 3} if "-O3" in words else {}
    assert of_a_live_server([str(model_folder), "--num-kv-blocks=64", *words]) == in_python(level, enforce_eager=True)


def of_a_live_server(words: list[str]) -> Any:
    """What GET /explain of a server shows that is started with these words."""
    config, settings, _ = serve.parsed([*words, "--port=0", "--api-key=secret"])
    one = Live(Server(config, settings))
    try:
        answer = one.wait_ready().http.get("/explain", headers={"Authorization": "Bearer secret"})
        assert answer.status_code == 200
        return answer.json()["config"]
    finally:
        one.close()


@pytest.mark.parametrize(("name", "value"), REFUSED_AT_O1)
def test_serve_refuses_what_can_not_be_honoured(name: str, value: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        in_python({"level": 1, name: value})
    assert main(["serve", "--port=0", "-O1", f"-O.{name}={json.dumps(value)}"]) == 2
    shown = capsys.readouterr()
    assert str(caught.value) in shown.err and shown.out == ""


def test_a_server_process_shows_its_flags(model_folder: Path, tmp_path: Path) -> None:
    words = [str(model_folder), "--port=0", "--num-kv-blocks=64", "-O1", "-O.backend=eager", "-O.freeze"]
    with process(words, tmp_path) as one:
        shown = httpx.get(f"{one.wait_ready().url}/explain").json()["config"]
    assert shown == in_python({"level": 1, "backend": "eager", "freeze": True})
