"""`onegraph debug`: one piece of a model alone: run it beside eager and fp64, step through it, find its code."""

from __future__ import annotations

import argparse
import json
import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onegraph.cli.flags import (
    ENGINE_FLAGS,
    Parser,
    UsageError,
    add_model_flags,
    engine_config,
    json_alone,
    split_compilation_words,
)
from onegraph.env import environment
from onegraph.errors import ConfigError, nearest

if TYPE_CHECKING:
    from onegraph.debug.inputs import PieceInputs
    from onegraph.debug.pieces import ChosenPiece
    from onegraph.debug.run import PieceRun
    from onegraph.store.unpacked import Edits

EXAMPLE = """example:
  onegraph debug run 2
  onegraph debug edit 2

PIECE is an index as `onegraph explain` lists them, the beginning of an artifact's key, or the path of its unpacked
folder. Each verb has --help and takes --json and --verbose. docs/how-to-debug.md tells more.
"""
_FORMAT = "compile_cache_save_format"
_INPUTS = ("prompt", "random", "saved")
_FILES = {
    "wrapper.py": "the Python of a call: it allocates, and calls the kernels",
    "kernels.cpp": "the piece's kernels, in C++",
    "graph.py": "the graph that was compiled, with the model's lines: for reading, edits change nothing",
    "README.md": "what is here",
    "original.json": "the key and what it was made of, and the checksums by which an edit is seen",
    "inputs.pt": "inputs that `debug run --save` has kept",
}


def main(words: list[str]) -> int:
    """See `onegraph debug --help`."""
    if not words or words[0] not in VERBS:
        if words and not words[0].startswith("-"):
            raise UsageError(f"onegraph debug: there is no verb {words[0]!r}; {nearest(words[0], VERBS)}")
        verbs = "\n".join(f"  {name:<4}  {about}" for name, (_, about) in VERBS.items())
        usage = "onegraph debug VERB PIECE [MODEL] [flags]"
        parser = Parser(prog="onegraph debug", usage=usage, description=f"verbs:\n{verbs}", epilog=EXAMPLE)
        _add_output_flags(parser)
        parser.parse_known_words(words)
        raise UsageError(f"onegraph debug: which verb? {', '.join(VERBS)}")
    return VERBS[words[0]][0](words[1:])


def run(words: list[str]) -> int:
    """Runs a piece."""
    rest, compilation = split_compilation_words(words)
    options = _run_parser().parse_known_words(rest)
    if options.gdb:
        return _under_gdb(words)
    _refuse_contradictions(options)
    config = engine_config(options, _unpacking(compilation))

    from onegraph.debug.inputs import WantedInputs, reached_with, save
    from onegraph.debug.pieces import PieceModel
    from onegraph.debug.run import run_piece

    with json_alone(options):
        model = PieceModel(config, options.size)
        prompts = tuple(options.prompt or ())
        wanted = WantedInputs(options.inputs, prompts, options.step, options.size, config.seed)
        reached, inputs = reached_with(model, model.find(options.piece), wanted)
        folder = model.folder(reached.compiled.key)
        if options.pdb or options.save:
            _refuse_without_folder(reached, folder, "--pdb" if options.pdb else "--save")
        kept = save(inputs, folder) if options.save and folder is not None else None  # it may crash
        if options.pdb and folder is not None:
            from onegraph.debug.debuggers import under_pdb

            wrapper = folder / "wrapper.py"
            found = run_piece(reached, inputs, lambda piece: under_pdb(wrapper, piece))
        else:
            found = run_piece(reached, inputs)
    facts = _facts(reached, folder, model.edits(reached.compiled.key))
    facts |= {
        "inputs": {"source": inputs.source, "sizes": inputs.sizes, "values": inputs.to_dict()},
        "outputs": [one.to_dict() for one in found.values],
        "raised": found.raised,
        "in_planned_memory": found.in_planned_memory,
        "seconds": {"compiled": found.compiled_s, "eager": found.eager_s},
        "saved": None if kept is None else str(kept),
        "ok": found.ok,
    }
    print(json.dumps(facts, indent=1) if options.json else _run_text(facts, inputs, found))
    return 0 if found.ok else 1


def _run_parser() -> Parser:
    parser = _parser("run", "onegraph debug run 2 --inputs random --size 64 --dtype float32")
    parser.add_argument(
        "--inputs",
        choices=_INPUTS,
        help="those of a step on --prompt; random ones like a step's, at --size; or those that --save has kept "
        "(default: what the other flags ask for, else saved ones where there are any, else those of a step)",
    )
    parser.add_argument("--prompt", action="append", help="a prompt of the step (default 'def '); several run together")
    parser.add_argument(
        "--step",
        type=_number,
        metavar="N",
        help="the step of the prompts: 1 (default) computes them, 2 their first new token",
    )
    parser.add_argument("--size", type=_number, metavar="N", help="tokens of random inputs (default 16)")
    parser.add_argument("--save", action="store_true", help="keep the inputs in the piece's unpacked folder")
    parser.add_argument("--pdb", action="store_true", help="stop in the piece's wrapper, under pdb")
    parser.add_argument("--gdb", action="store_true", help="run all of this under gdb")
    return parser


def edit(words: list[str]) -> int:
    """Tells where a piece's code is."""
    rest, compilation = split_compilation_words(words)
    parser = _parser("edit", "onegraph debug edit 2 --dtype float32")
    options = parser.parse_known_words(rest)
    config = engine_config(options, _unpacking(compilation, must=True))

    from onegraph.debug.pieces import PieceModel

    model = PieceModel(config)
    chosen = model.choose(model.find(options.piece))
    folder = model.folder(chosen.compiled.key)
    _refuse_without_folder(chosen, folder, "PIECE")
    facts = _facts(chosen, folder, model.edits(chosen.compiled.key))
    flags = _model_words(options, words, rest)
    facts |= {
        "files": {
            path.name: _FILES.get(path.name, "") for path in sorted(Path(facts["folder"]).iterdir()) if path.is_file()
        },
        "try": shlex.join(["onegraph", "debug", "run", options.piece, *flags]),
        "use": shlex.join(["onegraph", "run", *flags, f"-O.{_FORMAT}=unpacked"]),
    }
    print(json.dumps(facts, indent=1) if options.json else _edit_text(facts))
    return 0


VERBS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "run": (run, "run one piece compiled and eager, and compare both with fp64; exit code 1 if it is wrong"),
    "edit": (edit, "the folder with a piece's code, and what happens when it is edited"),
}


def _parser(verb: str, example: str) -> Parser:
    about = VERBS[verb][1]
    parser = Parser(
        prog=f"onegraph debug {verb}", description=f"{about[0].upper()}{about[1:]}.", epilog=f"example:\n  {example}\n"
    )
    parser.add_argument("piece", metavar="PIECE", help="an index, the beginning of a key, or an unpacked folder")
    add_model_flags(parser)
    _add_output_flags(parser)
    return parser


def _add_output_flags(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="print facts as JSON")
    parser.add_argument("--verbose", action="store_true", help="show tracebacks of errors")


def _under_gdb(words: Sequence[str]) -> int:
    from onegraph.debug.debuggers import gdb_command

    command = gdb_command(["debug", "run", *(word for word in words if word != "--gdb")], "kernels.cpp")
    os.execv(command[0], command)


def _refuse_contradictions(options: argparse.Namespace) -> None:
    """Flags that are for another kind of inputs than the one that is asked for would be ignored."""
    kinds = {"--prompt": "prompt", "--step": "prompt", "--size": "random"}
    given = {flag: kind for flag, kind in kinds.items() if getattr(options, flag.removeprefix("--")) is not None}
    if options.inputs is not None:
        given["--inputs"] = options.inputs
    if len(set(given.values())) > 1:
        told = " and ".join(f"{flag} {options.inputs}" if flag == "--inputs" else flag for flag in given)
        raise UsageError(f"onegraph debug run: {told} ask for different inputs ({', '.join(given.values())})")


def _unpacking(compilation: dict[str, Any], *, must: bool = False) -> dict[str, Any]:
    """The settings with artifacts unpacked, unless something else is asked for. Raises ConfigError if they must be."""
    if must and compilation.get(_FORMAT) == "binary":
        raise ConfigError("what isn't unpacked can't be edited", where=f"-O.{_FORMAT}=binary", hint="leave it out")
    if _FORMAT in compilation or (environment().disable_compile_cache and not must):
        return compilation
    return {**compilation, _FORMAT: "unpacked"}


def _refuse_without_folder(chosen: ChosenPiece, folder: Path | None, flag: str) -> None:
    if folder is None:
        raise ConfigError(
            f"piece {chosen.index} has no unpacked folder: {chosen.compiled.backend}, {chosen.compiled.why}",
            where=flag,
            hint="pieces that Inductor compiled, and that are kept, have one; `onegraph explain` lists them",
        )


def _facts(chosen: ChosenPiece, folder: Path | None, edits: Edits | None) -> dict[str, Any]:
    compiled = chosen.compiled
    return {
        "piece": chosen.index,
        "kind": chosen.piece.kind,
        "module_path": chosen.piece.module_path,
        "same_as": compiled.same_as,
        "shared_by": chosen.shared_by,
        "where": chosen.condition,
        "backend": compiled.backend,
        "key": compiled.key,
        "store": compiled.store,
        "why": compiled.why,
        "folder": None if folder is None else str(folder),
        "edited": [] if edits is None else list(edits.files),
    }


def _head(facts: dict[str, Any]) -> list[str]:
    shared = facts["shared_by"]
    of = f" ({facts['module_path']})" if facts["module_path"] else ""
    lines = [f"piece     {facts['piece']}{of}, {facts['backend']}, store {facts['store']}: {facts['why']}"]
    if facts["key"]:
        lines.append(f"artifact  {facts['key']}" + (f", where {facts['where']}" if facts["where"] else ""))
    if len(shared) > 1:
        lines.append(f"shared    by pieces {', '.join(map(str, shared))}: one artifact, each with weights of its own")
    if facts["folder"]:
        lines.append(
            f"code      {facts['folder']}" + (f", edited: {', '.join(facts['edited'])}" if facts["edited"] else "")
        )
    return lines


def _run_text(facts: dict[str, Any], inputs: PieceInputs, found: PieceRun) -> str:
    lines = _head(facts)
    weights = sum(inputs.is_weight)
    sizes = ", ".join(f"{name} = {size}" for name, size in inputs.sizes.items())
    lines.append(f"inputs    {inputs.source}; {sizes}" if sizes else f"inputs    {inputs.source}")
    for name, what, is_weight in zip(inputs.names, inputs.what, inputs.is_weight, strict=True):
        lines += [] if is_weight else [f"  {name}: {what}"]
    lines.append(f"  and {weights} weight{'s' if weights != 1 else ''} of the model")
    if facts["saved"]:
        lines.append(f"  saved as {facts['saved']}")
    for one in found.values:
        verdict = "ok" if one.ok else "WRONG"
        left = f"; {one.left_out} elements that nobody writes are left out" if one.left_out else ""
        lines.append(
            f"{verdict:<9} {one.name}: {one.dtype} {list(one.shape)}, error {one.max_error:.2g} against fp64, "
            f"eager's {one.found.eager_error:.2g}{left}"
        )
        lines += [] if one.ok else [f"  at {one.where}"]
    if found.raised:
        lines.append(f"RAISED    {found.raised}")
    eager = f"eager {1000 * found.eager_s:.3f} ms"
    if found.compiled_s is not None:
        memory = "in planned memory" if found.in_planned_memory else "in memory of its own"
        ratio = found.eager_s / found.compiled_s
        lines.append(f"seconds   compiled {1000 * found.compiled_s:.3f} ms {memory}, {eager} ({ratio:.2f}x)")
    else:
        lines.append(f"seconds   {eager}")
    wrong = [one.name for one in found.values if not one.ok]
    if found.raised:
        lines.append("it raises; eager doesn't")
    elif wrong:
        lines.append(f"wrong in {len(wrong)} of {len(found.values)}: {', '.join(wrong)}")
    else:
        lines.append("equal, as far as rounding goes: it is as near to fp64 as eager is")
    return "\n".join(lines)


def _edit_text(facts: dict[str, Any]) -> str:
    width = max(map(len, facts["files"]))
    lines = [facts["folder"]]
    lines += [f"  {name:<{width}}  {about}" for name, about in facts["files"].items()]
    lines += _head({**facts, "folder": None})
    lines += [
        f"edited    {', '.join(facts['edited']) or 'nothing yet'}",
        f"try       {facts['try']}",
        "          runs this piece alone beside eager and fp64",
        f"use       {facts['use']}",
        "          the start says that edited code runs; kernels are built anew, once for each text",
        "note      an edited piece is never recorded, and never replaced by an uncompiled one when it raises",
        f"undo      delete the file: the next start with -O.{_FORMAT}=unpacked writes it as it was;",
        "          `onegraph cache clear --edits` removes all folders. Without that flag edits aren't used at all",
    ]
    return "\n".join(lines)


def _model_words(options: argparse.Namespace, words: Sequence[str], rest: Sequence[str]) -> list[str]:
    """MODEL, the engine's flags and the compilation's, as they were given."""
    found = [] if options.model is None else [options.model]
    for flag in ENGINE_FLAGS:
        value, name = getattr(options, flag.field), flag.field.replace("_", "-")
        if flag.kind is bool and value is not None:
            found.append(f"--{'' if value else 'no-'}{name}")
        elif value is not None:
            found.append(f"--{name}={value}")
    left = list(rest)
    for word in words:  # those that aren't in `rest`, which has some of the words in their order
        if left and word == left[0]:
            left.pop(0)
        elif not word.startswith(f"-O.{_FORMAT}"):
            found.append(word)
    return found


def _number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)
