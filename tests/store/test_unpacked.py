"""Artifacts as files that people edit: what is unpacked, which edits take effect, what is said, and debuggers."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest
import torch
from tiny_llama import write_model
from torch import nn
from torch.export import Dim

import onegraph
from onegraph import LLM
from onegraph.counters import counters
from onegraph.errors import ArtifactError, CompileError
from onegraph.store import unpacked
from tests.store.terminal import Terminal, terminal

UNPACKED = {"compile_cache_save_format": "unpacked"}
x = torch.linspace(-2, 2, 40).reshape(5, 8)


class Scale(nn.Module):
    """One kernel, with a constant to edit."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return torch.tanh(values) + 1.5


def start(config: dict[str, Any] | None = None) -> tuple[Any, torch.Tensor]:
    """Compiles or loads, as a start does; gives the compiled module and what it gives for `x`."""
    compiled = onegraph.compile(
        Scale(), dynamic_shapes={"values": {0: Dim("num_tokens", min=1, max=32)}}, config=config or UNPACKED
    )
    with torch.no_grad():
        return compiled, compiled(x)


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The lines that onegraph has logged."""

    def lines() -> list[str]:
        return [one.getMessage() for one in caplog.records if one.name.startswith("onegraph.")]

    return lines


def piece_of(compiled: Any) -> dict[str, Any]:
    facts: dict[str, Any] = compiled.explain().to_dict()["pieces"][0]["ranges"][0]
    return facts


@pytest.fixture(scope="module")
def binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that has the artifact, as binary."""
    root = tmp_path_factory.mktemp("unpacked") / "root"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONEGRAPH_CACHE_ROOT", str(root))
        start({"compile_cache_save_format": "binary"})
    assert not (root / "unpacked").exists()
    return root


@pytest.fixture
def root(binary: Path, fresh_cache: Path) -> Path:
    shutil.copytree(binary, fresh_cache)
    return fresh_cache


@pytest.fixture
def folder(root: Path) -> Path:
    """The piece's folder."""
    start()
    (found,) = (root / "unpacked").iterdir()
    return found


def replace_in(path: Path, old: str, new: str) -> int:
    """Edits a file; gives the number of the first line that changed."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return text[: text.index(old)].count("\n") + 1


def insert_in_call(folder: Path, line: str) -> int:
    """Puts a line into the wrapper's `call`; gives its number."""
    return replace_in(folder / "wrapper.py", "        args.clear()\n", f"        {line}\n        args.clear()\n")


def blobs(root: Path) -> dict[str, str]:
    return {one.name: hashlib.sha256(one.read_bytes()).hexdigest() for one in (root / "blobs").glob("*/*")}


def test_a_binary_entry_is_unpacked_without_compiling(root: Path) -> None:
    with counters.expect(store_hits=1, inductor_compiles=0, gxx_runs=0, store_writes=0):
        compiled, out = start()
    assert torch.allclose(out, Scale()(x))
    key = piece_of(compiled)["key"]
    assert (root / "entries" / key[:2] / key).is_dir(), "the format isn't in the key"
    (folder,) = (root / "unpacked").iterdir()
    assert folder.name == f"piece_0-{key[:16]}"
    assert re.search(r"# File: .*test_unpacked.py:\d+ .*torch.tanh\(values\) \+ 1.5", (folder / "graph.py").read_text())
    assert "-O.compile_cache_save_format=unpacked" in (folder / "README.md").read_text()
    assert "1.5" in (folder / "kernels.cpp").read_text() and "def call" in (folder / "wrapper.py").read_text()
    assert unpacked.edits(root) == [] and not piece_of(compiled)["edited"]


def test_a_print_takes_effect_and_the_start_says_so(
    root: Path, folder: Path, capsys: pytest.CaptureFixture[str], told: Callable[[], list[str]]
) -> None:
    insert_in_call(folder, "print('the edit', args[0])")
    with counters.expect(store_hits=1, inductor_compiles=0, gxx_runs=0):
        compiled, out = start()
    assert "the edit 5" in capsys.readouterr().out and torch.allclose(out, Scale()(x))
    facts = piece_of(compiled)
    assert (facts["store"], facts["why"], facts["edited"]) == ("hit", "edited: wrapper.py", True)
    assert told() == [f"piece 0: edited code runs: wrapper.py in {folder}"]
    assert f"piece 0 runs edited code: wrapper.py in {folder}" in str(compiled.explain())
    assert [one.files for one in unpacked.edits(root)] == [("wrapper.py",)]


def test_a_constant_in_the_kernels_takes_effect_and_is_built_once(root: Path, folder: Path) -> None:
    before = blobs(root)
    replace_in(folder / "kernels.cpp", "(1.5)", "(2.5)")
    with counters.expect(inductor_compiles=0, gxx_runs=1):
        compiled, out = start()
    assert torch.allclose(out, Scale()(x) + 1) and piece_of(compiled)["why"] == "edited: kernels.cpp"
    with counters.expect(inductor_compiles=0, gxx_runs=0):
        assert torch.allclose(start()[1], Scale()(x) + 1)
    assert blobs(root) == before
    (folder / "kernels.cpp").unlink()
    compiled, out = start()
    assert torch.allclose(out, Scale()(x)) and not piece_of(compiled)["edited"]


def test_an_edit_that_isnt_right_is_an_error_with_its_line(root: Path, folder: Path) -> None:
    line = replace_in(folder / "kernels.cpp", "(1.5);", "(nothing_here);")
    with pytest.raises(CompileError, match="nothing_here") as broken:
        start()
    assert broken.value.where == f"{folder}/kernels.cpp:{line}" and "delete the file" in str(broken.value)
    (folder / "kernels.cpp").unlink()
    line = insert_in_call(folder, "args args")
    with pytest.raises(ArtifactError, match="SyntaxError") as unread:
        start()
    assert unread.value.where == f"{folder}/wrapper.py:{line}"
    (folder / "wrapper.py").write_bytes(b"\xff")
    with pytest.raises(ArtifactError, match="UnicodeDecodeError"):
        start()
    assert not (root / "quarantine").exists()


def test_tracebacks_show_the_files_lines_and_no_other_code_steps_in(folder: Path) -> None:
    line = insert_in_call(folder, "1 / 0")
    with pytest.raises(ZeroDivisionError) as caught:
        start()
    frame = traceback.extract_tb(caught.value.__traceback__)[-1]
    assert (frame.filename, frame.lineno, frame.line) == (str(folder / "wrapper.py"), line, "1 / 0")
    replace_in(folder / "wrapper.py", "1 / 0", "1 / (args[0] - 7)")
    compiled, _ = start()
    with pytest.raises(ZeroDivisionError) as later, torch.no_grad():
        compiled(torch.zeros(7, 8))
    assert not compiled.demote(later.value), "an edited piece is never replaced by an uncompiled one"


def test_code_that_isnt_edited_shows_its_file_too(folder: Path) -> None:
    compiled, _ = start()
    lines = (folder / "wrapper.py").read_text().splitlines()
    seen = set()

    def trace(frame: Any, event: str, arg: Any) -> Any:
        if event == "line" and frame.f_code.co_filename == str(folder / "wrapper.py"):
            seen.add(lines[frame.f_lineno - 1].strip())
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        with torch.no_grad():
            compiled(x)
    finally:
        sys.settrace(before)
    assert any(line.startswith("cpp_fused") for line in seen)


def test_without_the_format_edits_arent_used_and_one_line_says_so(folder: Path, told: Callable[[], list[str]]) -> None:
    replace_in(folder / "kernels.cpp", "(1.5)", "(2.5)")
    compiled, out = start({"compile_cache_save_format": "binary"})
    assert torch.allclose(out, Scale()(x)) and not piece_of(compiled)["edited"]
    assert told() == [f"edits aren't used (-O.compile_cache_save_format=unpacked uses them): kernels.cpp in {folder}"]


def test_the_variable_asks_for_the_format_as_well(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    insert_in_call(folder, "pass")
    monkeypatch.setenv("ONEGRAPH_COMPILE_CACHE_SAVE_FORMAT", "unpacked")
    assert piece_of(start({"level": 2})[0])["edited"]


def test_edits_of_another_graph_are_listed_with_what_differs(folder: Path, told: Callable[[], list[str]]) -> None:
    insert_in_call(folder, "pass")
    compiled, _ = start({**UNPACKED, "inductor_compile_config": {"size_asserts": False}})
    assert piece_of(compiled)["store"] == "miss"
    assert told() == [
        f"edits in {folder} (wrapper.py) belong to another graph: of piece 0; what differs now: Inductor's options"
    ]


@pytest.mark.full
def test_edits_outlive_the_entry_and_the_record(root: Path, folder: Path) -> None:
    insert_in_call(folder, "pass")
    shutil.rmtree(root / "entries")
    compiled, _ = start()
    assert piece_of(compiled)["why"] == "no artifact has this key; edited: wrapper.py"
    (folder / "original.json").write_text("[]")
    assert piece_of(start()[0])["edited"]
    (folder / "original.json").unlink()
    assert [one.folder for one in unpacked.edits(root)] == [folder]
    assert piece_of(start()[0])["edited"]


def test_what_is_for_reading_is_left_alone_with_a_word(folder: Path, told: Callable[[], list[str]]) -> None:
    (folder / "graph.py").write_text("mine")
    compiled, _ = start()
    assert told() == [f"{folder}/graph.py was edited, and is only for reading: nothing there takes effect"]
    assert (folder / "graph.py").read_text() == "mine" and not piece_of(compiled)["edited"]


def test_edits_are_removed_and_artifacts_stay(root: Path, folder: Path) -> None:
    insert_in_call(folder, "pass")
    assert unpacked.remove_edits(root) == [folder]
    assert unpacked.edits(root) == [] and unpacked.remove_edits(root) == [] and not (root / "unpacked").exists()
    assert piece_of(start()[0])["store"] == "hit"


@pytest.mark.full
def test_edits_are_used_and_told_below_torch_compile(root: Path, told: Callable[[], list[str]]) -> None:
    def compiled() -> torch.Tensor:
        torch._dynamo.reset()
        with torch.no_grad():
            out: torch.Tensor = torch.compile(Scale(), backend="onegraph", options=UNPACKED)(x)
            return out

    assert torch.allclose(compiled(), Scale()(x))
    (folder,) = (root / "unpacked").iterdir()
    replace_in(folder / "kernels.cpp", "(1.5)", "(2.5)")
    assert torch.allclose(compiled(), Scale()(x) + 1)
    assert told() == [f"piece 0: edited code runs: kernels.cpp in {folder}"]


def test_a_folder_that_cant_be_written_is_an_error(root: Path) -> None:
    (root / "unpacked").write_text("in the way")
    with pytest.raises(ArtifactError, match="can't be unpacked"):
        start()


# Debuggers, in terminals: of a program, and of a model of one piece.

PROGRAM = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
from test_unpacked import start
print("computed", float(start()[1].sum()))
"""


def test_a_process_group_is_made_where_a_distributed_breakpoint_needs_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    monkeypatch.setattr(torch.distributed, "breakpoint", lambda: sizes.append(torch.distributed.get_world_size()))
    insert_in_call(folder, "torch.distributed.breakpoint()")
    assert not torch.distributed.is_initialized()
    start()
    torch.distributed.destroy_process_group()
    assert sizes == [1]


@pytest.mark.full
def test_a_distributed_breakpoint_in_a_terminal(folder: Path) -> None:
    insert_in_call(folder, "torch.distributed.breakpoint()")
    threads = str(torch.get_num_threads())
    with terminal(["-c", PROGRAM, str(Path(__file__).parent)], PYTHONPATH=PATHS, OMP_NUM_THREADS=threads) as one:
        assert "made a process group of one rank" in one.expect("(Pdb) ")
        one.type("up\n")
        assert f"{folder}/wrapper.py" in one.expect("(Pdb) ")
        one.type("p args[0] * 6\n")
        assert "\n30\n" in one.expect("(Pdb) ")
        go_on(one, f"computed {float(Scale()(x).sum())}")
        assert one.end() == 0


PATHS = os.pathsep.join(["src", ".", "tests/llm", os.environ.get("PYTHONPATH", "")])
WORDS = ["--num-kv-blocks=64", "--max-num-batched-tokens=64", "-O1", "-O.compile_cache_save_format=unpacked"]
COMMAND = ["-m", "onegraph.cli.main"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A model's folder, and a cache that has it unpacked."""
    folder, root = write_model(tmp_path_factory.mktemp("model") / "tiny"), tmp_path_factory.mktemp("root") / "root"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONEGRAPH_CACHE_ROOT", str(root))
        LLM(str(folder), num_kv_blocks=64, max_num_batched_tokens=64, compilation_config={"level": 1, **UNPACKED})
    yield str(folder), root
    torch.set_num_threads(threads)


@pytest.fixture
def edit(model: tuple[str, Path]) -> Iterator[Callable[[str], Path]]:
    """Puts a line into the wrapper, for one test."""
    (folder,) = (model[1] / "unpacked").iterdir()
    text = (folder / "wrapper.py").read_text()

    def put(line: str) -> Path:
        insert_in_call(folder, line)
        return folder

    yield put
    (folder / "wrapper.py").write_text(text)


def go_on(one: Terminal, until: str) -> str:
    """Types `c` at each prompt until something else is shown; gives what was shown up to there."""
    one.type("c\n")
    shown = ""
    while until not in one.shown:
        if "(Pdb) " in one.shown:
            shown += one.expect("(Pdb) ")
            one.type("c\n")
        one.read()
    return shown + one.expect(until)


@pytest.mark.full
def test_a_breakpoint_under_serve_stops_the_engine_and_no_time_runs_out(
    model: tuple[str, Path], edit: Callable[[str], Path]
) -> None:
    folder = edit("breakpoint()")
    words = [*COMMAND, "serve", model[0], *WORDS, "--port=0", "--request-timeout-s=1"]
    answers: list[httpx.Response] = []
    with terminal(words, PYTHONPATH=PATHS, ONEGRAPH_CACHE_ROOT=str(model[1])) as one:
        assert f"edited code runs: wrapper.py in {folder}" in one.expect("(Pdb) ")
        shown = go_on(one, "Ctrl-C drains and ends")
        (url,) = re.findall(r"ready +(http://\S+/v1)", shown)
        asked = {"prompt": "def ", "max_tokens": 1}
        asking = Thread(target=lambda: answers.append(httpx.post(f"{url}/completions", json=asked, timeout=120)))
        asking.start()
        assert f"{folder}/wrapper.py" in one.expect("(Pdb) ")
        one.type("p 6 * 7\n")
        assert "\n42\n" in one.expect("(Pdb) ")
        asking.join(2.5)
        assert not answers and httpx.get(f"{url.removesuffix('/v1')}/health").status_code == 200
        one.type("clear\nc\n")
        while asking.is_alive():
            one.read(0.2)
            if one.shown.endswith("(Pdb) "):
                one.shown = ""
                one.type("c\n")
        assert answers[0].status_code == 200, answers[0].text
        one.type("\x03")
        assert one.end() == 0


@pytest.mark.full
@pytest.mark.parametrize("line", ["breakpoint()", "torch.distributed.breakpoint()"])
def test_a_second_interrupt_ends_a_server_at_a_breakpoint(
    line: str, model: tuple[str, Path], edit: Callable[[str], Path]
) -> None:
    edit(line)
    with terminal(
        [*COMMAND, "serve", model[0], *WORDS, "--port=0"], PYTHONPATH=PATHS, ONEGRAPH_CACHE_ROOT=str(model[1])
    ) as one:
        assert ("made a process group of one rank" in one.expect("(Pdb) ")) == ("distributed" in line)
        one.type("\x03")
        one.expect("draining")
        one.type("\x03")
        assert one.end(20) == 1


@pytest.mark.full
@pytest.mark.parametrize("line", ["breakpoint()", "torch.distributed.breakpoint()"])
def test_a_breakpoint_under_run_takes_interrupts_and_quits(
    line: str, model: tuple[str, Path], edit: Callable[[str], Path]
) -> None:
    edit(line)
    words = [*COMMAND, "run", model[0], *WORDS, "--prompt=def ", "--max-tokens=2"]
    with terminal(words, PYTHONPATH=PATHS, ONEGRAPH_CACHE_ROOT=str(model[1])) as one:
        shown = one.expect("(Pdb) ")
        assert ("made a process group of one rank" in shown) == ("distributed" in line)
        one.read(0.5)  # an interrupt between the prompt and its wait would only be seen with the next key
        one.type("\x03")
        assert "--KeyboardInterrupt--" in one.expect("(Pdb) ")
        go_on(one, "tokens/s")
        assert one.end() == 0
    with terminal(words, PYTHONPATH=PATHS, ONEGRAPH_CACHE_ROOT=str(model[1])) as one:
        one.expect("(Pdb) ")
        one.type("q\n")
        assert one.end() == 1 and "onegraph: ended from the debugger" in one.shown


@pytest.mark.full
def test_a_breakpoint_under_llm(model: tuple[str, Path], edit: Callable[[str], Path]) -> None:
    folder = edit("torch.distributed.breakpoint()")
    settings = {
        "num_kv_blocks": 64,
        "max_num_batched_tokens": 64,
        "compilation_config": {"level": 1, **UNPACKED},
    }
    program = f"""
from onegraph import LLM, SamplingParams
llm = LLM({model[0]!r}, **{settings!r})
print("answered", len(llm.generate("def ", SamplingParams(max_tokens=1), use_tqdm=False)))
"""
    with terminal(["-c", program], PYTHONPATH=PATHS, ONEGRAPH_CACHE_ROOT=str(model[1])) as one:
        one.expect("(Pdb) ")
        one.type("up\n")
        assert f"{folder}/wrapper.py" in one.expect("(Pdb) ")
        go_on(one, "answered 1")
        assert one.end() == 0


def test_the_record_is_readable(folder: Path) -> None:
    record = json.loads((folder / "original.json").read_text())
    assert record["sources"] == ["wrapper.py", "kernels.cpp"] and set(record["files"]) > set(record["sources"])
