"""`onegraph config`: the effective value of every setting, and why."""

from __future__ import annotations

import json

from onegraph.cli.flags import ENGINE_FLAGS, Parser, add_model_flags, engine_config, split_compilation_words

EXAMPLE = """example:
  onegraph config -O1 -O.backend=aot_eager
"""


def main(words: list[str]) -> int:
    """See `onegraph config --help`."""
    rest, compilation = split_compilation_words(words)
    parser = Parser(
        prog="onegraph config",
        description="Prints what the given flags come to, without loading a model.",
        epilog=EXAMPLE,
    )
    add_model_flags(parser)
    parser.add_argument("--json", action="store_true", help="print facts as JSON")
    parser.add_argument("--verbose", action="store_true", help="show tracebacks of errors")
    options = parser.parse_known_words(rest)
    config = engine_config(options, compilation)

    from onegraph.config.compilation import CompilationConfig
    from onegraph.config.resolve import resolve
    from onegraph.env import environment
    from onegraph.passes.catalogue import choose_passes
    from onegraph.targets import device_rules, resolve_device

    device = resolve_device(config.device)
    resolved = resolve(
        CompilationConfig.of(config.compilation_config),
        rules=device_rules(device, batches=True),
        environment=environment(),
        enforce_eager=config.enforce_eager,
    )
    if resolved.inductor_compile_config:
        from onegraph.torch_compat.inductor import check_options  # imports Inductor, which takes seconds

        check_options(resolved.inductor_compile_config)
    passes = [one.name for one in choose_passes(resolved).passes]
    facts = resolved.to_dict()
    for flag in ENGINE_FLAGS:
        given = getattr(options, flag.field) is not None
        facts[flag.field] = {"value": getattr(config, flag.field), "why": "user" if given else "default"}
    if config.device != device:
        facts["device"] = {"value": device, "why": f"{facts['device']['why']}: {config.device}"}
    facts["passes_run"] = {"value": passes, "why": "in this order"}
    if options.json:
        print(json.dumps(facts, indent=1, default=str))
        return 0
    width = max(len(name) for name in facts)
    values = {name: json.dumps(item["value"], default=str) for name, item in facts.items()}
    value_width = min(30, max(len(value) for value in values.values()))
    for name, item in facts.items():
        print(f"{name:<{width}}  {values[name]:<{value_width}}  {item['why']}")
    return 0
