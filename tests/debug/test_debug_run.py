"""`onegraph debug run`: right pieces are equal, a planted wrong constant is found and named, inputs are as told."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from onegraph.cli.main import main
from onegraph.config.engine import EngineConfig
from onegraph.debug.inputs import PROMPT, SIZE, PieceInputs, WantedInputs, reached_with, save
from onegraph.debug.pieces import PieceModel, ReachedPiece
from onegraph.debug.run import PieceRun, run_piece
from onegraph.errors import ArtifactError, ConfigError
from tests.debug.conftest import CONFIG, UNPACKED, WORDS, Edit
from tests.store.terminal import terminal

pytestmark = pytest.mark.usefixtures("in_root")
COMMAND = ["-m", "onegraph.cli.main", "debug", "run"]
RANDOM = WantedInputs("random", size=17)


def ran(model: PieceModel, word: str, wanted: WantedInputs | None = None) -> tuple[ReachedPiece, PieceInputs, PieceRun]:
    reached, inputs = reached_with(model, model.find(word), wanted or WantedInputs())
    return reached, inputs, run_piece(reached, inputs)


def variables(root: Path) -> dict[str, str]:
    paths = os.pathsep.join(["src", os.environ.get("PYTHONPATH", "")])
    return {"PYTHONPATH": paths, "ONEGRAPH_CACHE_ROOT": str(root), "OMP_NUM_THREADS": str(torch.get_num_threads())}


def weights_of(inputs: PieceInputs) -> set[str]:
    return {what for what, is_weight in zip(inputs.what, inputs.is_weight, strict=True) if is_weight}


@pytest.mark.parametrize("piece", [0, 1, 2, 8])
def test_each_piece_is_equal_on_a_step_and_on_random_inputs(model: PieceModel, piece: int) -> None:
    for wanted in (WantedInputs("prompt"), WantedInputs("prompt", step=2), RANDOM):
        reached, inputs, found = ran(model, str(piece), wanted)
        assert found.ok and found.raised is None and (found.in_planned_memory or piece != 2)
        assert found.values and all(one.left_out == 0 and one.found.max_error < 0.1 for one in found.values)
        assert (reached.piece.kind == "splitting_op") == (piece % 2 == 1)
        tokens = {None: 2, 2: 1}[wanted.step] if wanted.kind == "prompt" else 17
        assert inputs.sizes["num_tokens"] == tokens


def test_pieces_that_share_an_artifact_have_weights_of_their_own(model: PieceModel) -> None:
    (first, one, _), (second, other, _) = ran(model, "2"), ran(model, "4")
    assert first.shared_by == second.shared_by == [2, 4, 6] and second.compiled.same_as == 2
    assert first.compiled.key == second.compiled.key
    assert weights_of(one) and weights_of(one).isdisjoint(weights_of(other))


def test_a_splitting_op_is_compared_with_its_reference_and_what_it_writes_too(model: PieceModel) -> None:
    _, inputs, found = ran(model, "1", RANDOM)
    written = [inputs.names[index] for index in sorted(inputs.written)]
    assert len(written) == 2
    assert [one.name for one in found.values[1:]] == [f"{name}, as it leaves it" for name in written]
    caches = [inputs.values[index].clone() for index in sorted(inputs.written)]
    _, again, _ = ran(model, "1", RANDOM)
    for before, index in zip(caches, sorted(again.written), strict=True):
        assert torch.equal(before, inputs.values[index]), "runs write into copies"
    broken = ReachedPiece(ran(model, "1")[0].one, 0, 1, inputs.values)
    call = broken.compiled.call

    def wrong(given: list[Any]) -> Any:
        return [one * 1.5 for one in call(given)]

    one = broken.one
    pieces = list(one.pieces[0])
    pieces[1] = replace(pieces[1], call=wrong)
    found = run_piece(replace(broken, one=replace(one, pieces=(tuple(pieces),))), inputs)
    assert [value.ok for value in found.values] == [False, True, True]


def test_random_inputs_are_the_same_again_and_whole_numbers_stay_in_range(model: PieceModel) -> None:
    (_, one, first), (_, other, second) = ran(model, "8", RANDOM), ran(model, "8", RANDOM)
    assert first.values == second.values
    _, third, _ = ran(model, "8", WantedInputs("random", size=17, seed=1))
    for value, same, another, what in zip(one.values, other.values, third.values, one.what, strict=True):
        if ", drawn: mean" in what:
            assert torch.equal(value, same) and not torch.equal(value, another)
    assert any(", drawn: mean" in what for what in one.what)
    _, first_piece, _ = ran(model, "0", RANDOM)
    ids = first_piece.values[first_piece.names.index("l_input_ids_")]
    assert len(set(ids.flatten().tolist())) > 5
    assert any(what.endswith(", as in the step") for what in first_piece.what)


def test_inputs_are_saved_and_then_taken(model: PieceModel) -> None:
    with pytest.raises(ConfigError, match="no inputs of piece 6 are saved"):
        ran(model, "6", WantedInputs("saved"))
    reached, inputs, found = ran(model, "2", WantedInputs(prompts=("import os",)))
    folder = model.folder(reached.compiled.key)
    assert folder is not None
    path = save(inputs, folder)
    try:
        _, again, taken = ran(model, "2")
        assert again.source == "saved, step 1 of 'import os'" and again.sizes == inputs.sizes
        assert taken.values == found.values
        _, twin, of_twin = ran(model, "6", WantedInputs("saved"))
        assert of_twin.ok and of_twin.values != found.values and twin.source == again.source
        kept = torch.load(path, weights_only=True)["values"]
        assert [one is None for one in kept] == list(inputs.is_weight)
        assert ran(model, "2", WantedInputs(prompts=("def ",)))[1].source == "step 1 of 'def '"
        place = next(i for i, one in enumerate(kept) if isinstance(one, torch.Tensor))
        shorter = [one[..., :-1] if i == place else one for i, one in enumerate(kept)]
        for values in (kept[:-1], shorter, [*kept[:place], kept[place].double(), *kept[place + 1 :]]):
            torch.save({"values": values, "sizes": inputs.sizes, "source": ""}, path)
            with pytest.raises(ArtifactError, match="of another piece"):
                ran(model, "2")
        torch.save({"values": kept, "sizes": dict.fromkeys(inputs.sizes, 10**9), "source": ""}, path)
        with pytest.raises(ArtifactError, match=r"1000000000 tokens, and a step"):
            ran(model, "2")
        torch.save({"values": None, "sizes": dict.fromkeys(inputs.sizes, "abc"), "source": ""}, path)
        with pytest.raises(ArtifactError, match="can't be read"):
            ran(model, "2")
        path.write_bytes(b"nothing")
        with pytest.raises(ArtifactError, match="can't be read"):
            ran(model, "2")
    finally:
        path.unlink()


def test_pieces_are_found_by_index_key_and_folder(model: PieceModel, tmp_path: Path) -> None:
    reached, _ = reached_with(model, model.find("2"), WantedInputs())
    key, folder = str(reached.compiled.key), model.folder(reached.compiled.key)
    assert model.find("2").key is None
    for word in (key, key[:8], f"piece_2-{key[:16]}", str(folder)):
        assert (model.find(word).index, model.find(word).key) == (2, key), word
    for word, told in {
        "99": r"the model's pieces are 0\.\.8",
        "abc": r"the model's pieces are 0\.\.8",
        "zz": "there is no piece 'zz'",
        str(tmp_path): "there is no piece",
        ("0" if key[0] != "0" else "1") + key[1:]: f"did you mean '{key}'",
    }.items():
        with pytest.raises(ConfigError, match=told):
            model.find(word)
    other = tmp_path / "piece_2-other"
    other.mkdir()
    (other / "original.json").write_text(json.dumps({"key": "f" * 64, "files": {}}))
    with pytest.raises(ConfigError, match="another graph"):
        model.find(str(other))


def test_sizes_and_steps_that_there_arent_are_refused(model: PieceModel) -> None:
    with pytest.raises(ConfigError, match=r"a step has 1\.\.64"):
        ran(model, "2", WantedInputs("random", size=65))
    assert ran(model, "2", WantedInputs("random", size=64))[2].ok
    with pytest.raises(ConfigError, match="must hold the output"):
        ran(model, "2", WantedInputs(prompts=("def " * 2000,)))
    assert ran(model, "2")[2].ok, "what was refused left nothing behind"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["2", "--inputs=random", "--prompt=a"], "--prompt and --inputs random ask for different inputs"),
        (["2", "--size=5", "--step=2"], "ask for different inputs"),
        (["2", "--size=0"], "no whole number from 1 on"),
        (["2", "--enforce-eager"], "nothing of ours is compiled"),
        (["2", "--artifact=some.onegraph"], "an artifact's file has no graphs"),
    ],
)
def test_what_cant_be_done_is_bad_usage(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["debug", "run", *words, *WORDS]) == 2
    assert told in capsys.readouterr().err


def test_edits_that_are_wrong_are_found_and_named(
    model: PieceModel, edit: Edit, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = {piece: model.folder(ran(model, piece)[0].compiled.key) for piece in ("2", "8")}
    assert folders["2"] is not None and folders["8"] is not None
    edit(folders["2"], "kernels.cpp", "static_cast<float>(1e-05)", "static_cast<float>(10)")
    wrapper = edit(folders["8"], "wrapper.py", "        args.clear()\n", "        1 / 0\n        args.clear()\n")
    assert main(["debug", "run", "4", *WORDS, "--json"]) == 1
    facts = json.loads(capsys.readouterr().out)
    assert not facts["ok"] and facts["edited"] == ["kernels.cpp"] and facts["same_as"] == 2
    wrong = [one for one in facts["outputs"] if not one["ok"]]
    assert wrong and all(re.match(r"\[[\d, ]+\]: compiled \S+, eager \S+, reference", one["where"]) for one in wrong)
    assert all(one["max_error"] > 4 * one["eager_error"] for one in wrong)
    edited = PieceModel(EngineConfig(compilation_config=UNPACKED, **CONFIG))
    _, _, found = ran(edited, "8")
    assert found.raised is not None and not found.ok and found.values == () and found.compiled_s is None
    assert found.raised.startswith("ZeroDivisionError: division by zero") and f"{wrapper}:" in found.raised


def test_pdb_stops_at_the_first_line_of_the_wrappers_call(model: PieceModel, root: Path) -> None:
    folder = model.folder(ran(model, "2")[0].compiled.key)
    with terminal([*COMMAND, "2", *WORDS, "--pdb"], **variables(root)) as one:
        assert f"{folder}/wrapper.py" in one.expect("(Pdb) ")
        one.type("n\n")
        assert f"{folder}/wrapper.py" in one.expect("(Pdb) ")
        one.type("p 6 * 7\n")
        assert "\n42\n" in one.expect("(Pdb) ")
        one.type("c\n")
        shown = one.expect("equal, as far as rounding goes")
        assert one.end() == 0
    assert "shared    by pieces 2, 4, 6" in shown and f"code      {folder}" in shown
    assert re.search(r"^ok +\w+: bfloat16 \[.*\], error \S+ against fp64, eager's \S+$", shown, re.MULTILINE)


def test_help_has_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["debug", "run", "--help"])
    shown = capsys.readouterr().out
    assert f"(default {PROMPT!r})" in shown and f"random inputs (default {SIZE})" in shown


def test_gdb_is_asked_for_where_it_isnt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["debug", "run", "2", "--gdb"]) == 2
    assert "gdb isn't installed" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("gdb") is None, reason="gdb isn't installed")
@pytest.mark.full
def test_gdb_stops_in_a_line_of_edited_kernels(model: PieceModel, root: Path, edit: Edit) -> None:
    folder = model.folder(ran(model, "2")[0].compiled.key)
    assert folder is not None
    path = edit(folder, "kernels.cpp", "static PyMethodDef", "// edited\nstatic PyMethodDef")
    line = next(i for i, text in enumerate(path.read_text().splitlines(), 1) if "loadu(" in text)
    result = subprocess.run(
        [sys.executable, *COMMAND, "2", *WORDS, "--gdb"],
        input=f"break kernels.cpp:{line}\nrun\nbt 1\nkill\nquit\n",
        capture_output=True,
        text=True,
        env={**os.environ, **variables(root)},
        timeout=300,
    )
    assert re.search(rf"Breakpoint 1, .*kernel.*kernels\.cpp:{line}\b", result.stdout, re.DOTALL), result.stdout
