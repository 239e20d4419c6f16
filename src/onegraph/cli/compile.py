"""`onegraph compile`: compiles a model ahead of time, into one file."""

from __future__ import annotations

import json
from pathlib import Path

from onegraph.cli.flags import (
    Parser,
    UsageError,
    add_model_flags,
    engine_config,
    llm_arguments,
    split_compilation_words,
)

EXAMPLE = """example:
  onegraph compile -o model.onegraph --max-num-batched-tokens 1024
  onegraph run --artifact model.onegraph --max-num-batched-tokens 1024
"""


def main(words: list[str]) -> int:
    """See `onegraph compile --help`."""
    rest, compilation = split_compilation_words(words)
    parser = Parser(
        prog="onegraph compile",
        description="Loads and compiles a model, and writes what was compiled to one file: no weights. `run`, `serve` "
        "and the others take it with --artifact, given the same model and settings, on a machine of the same kind.",
        epilog=EXAMPLE,
    )
    add_model_flags(parser)
    parser.add_argument("-o", "--output", metavar="FILE", help="the file to write")
    parser.add_argument("--json", action="store_true", help="print facts as JSON")
    parser.add_argument("--verbose", action="store_true", help="show tracebacks of errors")
    options = parser.parse_known_words(rest)
    if options.output is None:
        raise UsageError("onegraph compile: -o FILE says where to")
    config = engine_config(options, compilation)

    from onegraph import LLM

    file = Path(options.output)
    llm = LLM(**llm_arguments(config))
    llm.save(file)
    explanation = llm.explain()
    pieces = {one.key for piece in explanation.pieces for one in piece.ranges if one.key is not None}
    num_bytes = file.stat().st_size
    facts = {
        "file": str(file),
        "bytes": num_bytes,
        "model": explanation.model,
        "device": explanation.device,
        "artifacts": len(pieces),
        "start": explanation.start,
    }
    told = f"{facts['model']} for {facts['device']}: {len(pieces)} artifacts, {num_bytes / 2**20:.1f} MiB in {file}"
    print(json.dumps(facts, indent=1) if options.json else told)
    return 0
