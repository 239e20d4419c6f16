"""`onegraph explain`: compiles or loads a model, and tells how."""

from __future__ import annotations

import dataclasses
import json

from onegraph.cli.flags import (
    Parser,
    add_model_flags,
    engine_config,
    json_alone,
    llm_arguments,
    split_compilation_words,
)

EXAMPLE = """example:
  onegraph explain --json | jq '.pieces[0].ranges'
"""


def main(words: list[str]) -> int:
    """See `onegraph explain --help`."""
    rest, compilation = split_compilation_words(words)
    parser = Parser(
        prog="onegraph explain",
        description="Loads and compiles a model, and tells the config with why, stages with seconds, dims, pieces "
        "and whether the compile cache had them, and what the captured graph assumes.",
        epilog=EXAMPLE,
    )
    add_model_flags(parser)
    parser.add_argument(
        "--check",
        type=int,
        metavar="N",
        help="also compare compiled with eager and fp64 at N batch sizes; exit code 1 if a size is wrong",
    )
    parser.add_argument(
        "--plan",
        action="store_true",
        help="also print the function that runs the pieces, and the memory that it reuses",
    )
    parser.add_argument(
        "--passes", action="store_true", help="also print what each pass rewrote, and where it nearly did"
    )
    parser.add_argument("--json", action="store_true", help="print facts as JSON")
    parser.add_argument("--verbose", action="store_true", help="show tracebacks of errors")
    options = parser.parse_known_words(rest)
    config = engine_config(options, compilation)

    from onegraph import LLM

    with json_alone(options):
        llm = LLM(**llm_arguments(config))
        checks = llm.check(options.check) if options.check is not None else ()
    explanation = llm.explain()
    facts = explanation.to_dict()
    if options.plan:
        buffers = None if explanation.buffers is None else dataclasses.asdict(explanation.buffers)
        facts |= {"plan_source": explanation.plan_source, "buffers": buffers}
    parts = [str(explanation)]
    parts += [explanation.passes_text] if options.passes else []
    parts += [explanation.plan_text] if options.plan else []
    print(json.dumps(facts, indent=1) if options.json else "\n\n".join(parts))
    return 0 if all(check.ok for check in checks) else 1
