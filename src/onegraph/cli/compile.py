"""`onegraph compile`: compiles a model ahead of time, into one file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from onegraph.cli.flags import Parser, UsageError, add_model_flags, engine_config, split_compilation_words
from onegraph.errors import ConfigError
from onegraph.targets import MARCHES

EXAMPLE = """example:
  onegraph compile MODEL -o model.onegraph --max-num-batched-tokens 1024
  onegraph run MODEL --artifact model.onegraph --max-num-batched-tokens 1024

for a machine with AVX-512 that runs it with 16 threads:
  onegraph compile MODEL -o model.onegraph --march avx512 --threads 16
"""


def main(words: list[str]) -> int:
    """See `onegraph compile --help`."""
    rest, compilation = split_compilation_words(words)
    parser = Parser(
        prog="onegraph compile",
        description="Compiles a model, and writes what was compiled to one file, without reading weights: of MODEL, "
        "config and tokenizer are enough. `run`, `serve` and the others take the file with --artifact, given the "
        "same model and settings, on a machine that it is for; what it isn't for is refused with what differs.",
        epilog=EXAMPLE,
    )
    add_model_flags(parser)
    parser.add_argument("-o", "--output", metavar="FILE", help="the file to write")
    parser.add_argument(
        "--march", metavar="CPU", help=f"the CPU to compile for: {', '.join(MARCHES)} (default: {MARCHES[0]}, this one)"
    )
    parser.add_argument(
        "--threads", type=int, metavar="N", help="threads that will run it (default: as many as torch has here)"
    )
    parser.add_argument("--json", action="store_true", help="print facts as JSON")
    parser.add_argument("--verbose", action="store_true", help="show tracebacks of errors")
    options = parser.parse_known_words(rest)
    if options.output is None:
        raise UsageError("onegraph compile: -o FILE says where to")
    if options.artifact is not None:
        raise UsageError("onegraph compile: --artifact is for what takes the file; -o FILE writes it")
    file = Path(options.output)
    if not file.absolute().parent.is_dir():
        raise ConfigError(f"there is no folder {file.absolute().parent}", where="-o", hint="make it first")
    config = engine_config(options, compilation)

    from onegraph.engine.ahead_of_time import compile_ahead
    from onegraph.store.transfer import archive_place

    archive_place(file)

    made = compile_ahead(config, march=options.march, threads=options.threads)
    made.compiled.save(file)
    facts = _facts(made, file)
    print(json.dumps(facts, indent=1) if options.json else _text(facts))
    return 0


def _facts(made: Any, file: Path) -> dict[str, Any]:
    explanation = made.explanation
    pieces = {one.key for piece in explanation.pieces for one in piece.ranges if one.key is not None}
    return {
        "file": str(file),
        "bytes": file.stat().st_size,
        "model": explanation.model,
        "weights_read": False,
        "device": explanation.device,
        "machine": made.machine,
        "dtype": str(made.model.kv.dtype).removeprefix("torch."),
        "num_kv_blocks": made.limits.kv_cache.num_blocks,
        "dims": {dim.name: [dim.min, dim.max] for dim in explanation.dims},
        "artifacts": len(pieces),
        "start": explanation.start,
        "seconds": round(made.seconds, 3),
        "pending": list(explanation.pending),
        "notes": list(explanation.notes),
    }


def _text(facts: dict[str, Any]) -> str:
    lines = [f"note: {note}" for note in facts["notes"]]
    lines += [f"at the first load: {one}" for one in facts["pending"]]
    lines.append(
        f"{facts['model']}, {facts['dtype']}, for {facts['device']}: {facts['artifacts']} artifacts, "
        f"{facts['bytes'] / 2**20:.1f} MiB in {facts['file']}; no weights were read"
    )
    return "\n".join(lines)
