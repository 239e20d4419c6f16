"""`onegraph run`: loads a model, generates for prompts, and prints the texts."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from onegraph.cli.flags import (
    Parser,
    add_model_flags,
    engine_config,
    json_alone,
    llm_arguments,
    split_compilation_words,
)

PROMPTS = ("def ", "import ", "class Queue:\n", "for i in range(")
EXAMPLE = """example:
  onegraph run --prompt "def " --max-tokens 40 -O.backend=eager
"""


def main(words: list[str]) -> int:
    """See `onegraph run --help`."""
    rest, compilation = split_compilation_words(words)
    parser = Parser(prog="onegraph run", description="Generates text for prompts, offline.", epilog=EXAMPLE)
    add_model_flags(parser)
    parser.add_argument("--prompt", action="append", help="a prompt; may be given more than once")
    parser.add_argument("--max-tokens", type=int, default=48, help="most tokens to generate for each (default 48)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): always the likeliest token")
    parser.add_argument(
        "--table", action="store_true", help="also run uncompiled, and print seconds and tokens/s of both"
    )
    parser.add_argument("--json", action="store_true", help="print facts as JSON instead of text")
    parser.add_argument("--verbose", action="store_true", help="show tracebacks of errors")
    options = parser.parse_known_words(rest)
    config = engine_config(options, compilation)

    from onegraph import LLM, SamplingParams

    params = SamplingParams(temperature=options.temperature, max_tokens=options.max_tokens)
    prompts = list(options.prompt or PROMPTS)
    with json_alone(options):
        llm = LLM(**llm_arguments(config))
        if not options.json:
            print(llm.summary(), flush=True)
        quiet = options.json or not sys.stderr.isatty()
        facts = _generate(llm, prompts, params, quiet)
        table = _compare(llm, config, prompts, params, facts, quiet) if options.table else None
    if options.json:
        explained = llm.explain().to_dict()
        print(json.dumps({**facts, "table": table, "explain": explained}, indent=1))
        return 0
    for output in facts["outputs"]:
        print(f"\n--- {output['prompt']!r} ({output['finish_reason']})\n{output['prompt']}{output['text']}")
    print(f"\n{facts['tokens']} tokens in {facts['seconds']:.2f} s: {facts['tokens_per_s']:.1f} tokens/s")
    if table is not None:
        print("\n" + _table_text(table))
    return 0


def _generate(llm: Any, prompts: list[str], params: Any, quiet: bool) -> dict[str, Any]:
    started = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=not quiet)
    seconds = time.perf_counter() - started
    tokens = sum(len(sample.token_ids) for output in outputs for sample in output.outputs)
    return {
        "outputs": [
            {
                "prompt": output.prompt,
                "text": output.outputs[0].text,
                "token_ids": list(output.outputs[0].token_ids),
                "finish_reason": output.outputs[0].finish_reason,
            }
            for output in outputs
        ],
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
    }


def _compare(
    llm: Any, config: Any, prompts: list[str], params: Any, facts: dict[str, Any], quiet: bool
) -> dict[str, Any]:
    """The same prompts again, compiled and uncompiled in turn; the best of each of two rounds."""
    from onegraph import LLM, CompilationConfig

    arguments = llm_arguments(config)
    arguments.update(enforce_eager=True, compilation_config=CompilationConfig(), enable_prefix_caching=False)
    eager = LLM(**arguments)
    rates: dict[str, list[float]] = {"compiled": [], "eager": []}
    same = True
    for _ in range(2):
        for name, engine in (("compiled", llm), ("eager", eager)):
            again = _generate(engine, prompts, params, quiet)
            rates[name].append(again["tokens_per_s"])
            same = same and [o["token_ids"] for o in again["outputs"]] == [o["token_ids"] for o in facts["outputs"]]
    explanation = llm.explain()
    return {
        "start": explanation.start,
        "stages": {name: round(seconds, 3) for name, seconds in explanation.stages},
        "traced": explanation.index is None or explanation.index.status != "hit",
        "eager_tokens_per_s": round(max(rates["eager"]), 1),
        "compiled_tokens_per_s": round(max(rates["compiled"]), 1),
        "same_tokens": same,
    }


def _table_text(table: dict[str, Any]) -> str:
    stages = table["stages"]
    took = [("index", f"{stages.get('index', 0.0):.2f} s: nothing was traced or compiled")]
    if table["traced"]:
        load = "load" if table["start"] == "warm" else "compile"
        took = [
            (title, f"{stages.get(name, 0.0):.2f} s") for title, name in (("capture",) * 2, (load, "compile or load"))
        ]
    eager, compiled = table["eager_tokens_per_s"], table["compiled_tokens_per_s"]
    rows = [
        ("start", str(table["start"])),
        *took,
        ("eager", f"{eager:.1f} tokens/s"),
        ("compiled", f"{compiled:.1f} tokens/s ({compiled / eager:.2f}x)"),
        ("same tokens", "yes" if table["same_tokens"] else "no: rounding decided a near tie, or see `explain`"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
