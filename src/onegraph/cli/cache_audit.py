"""`onegraph cache audit`: whether keys are equal exactly where the compiler is handed the same."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from onegraph.cli.flags import Parser, add_model_flags, engine_config, split_compilation_words
from onegraph.env import environment

if TYPE_CHECKING:
    from onegraph.audit.audit import Report
    from onegraph.audit.perturbation import Perturbation

ABOUT = "change settings and captured values one by one, and compare keys with what is compiled"
_DESCRIPTION = """Changes settings and captured values of a model one by one, and compares keys with what is compiled.

Nothing is compiled or written. Each line is a change and its verdict:

  fine              the compiler is handed something else and the key is another one, or neither
  stale             the compiler is handed something else, and the key is the same
  needless          the compiler is handed the same, and the key is another one
  unseen            something else is compiled, and the trace that is kept would still be taken
  wrong prediction  a field reaches more than what is declared of it (docs/options.md)
  broken            a setting of ours ends in another error than one of ours
  refused           there is no such configuration here, or the model doesn't run with the value
"""
EXAMPLE = """example:
  onegraph cache audit -O.backend=eager --only field torch
  onegraph cache audit --json | jq '.changes[] | select(.verdict == "stale")'
"""


def audit(words: list[str]) -> int:
    """See `onegraph cache audit --help`."""
    rest, compilation = split_compilation_words(words)
    parser = Parser(prog="onegraph cache audit", description=_DESCRIPTION, epilog=EXAMPLE)
    parser.add_argument(
        "--only",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="groups (field, pass, env, torch, inductor, value) or changes (field.level, value.*eps)",
    )
    parser.add_argument("--all", action="store_true", help="print the changes that are fine, too")
    parser.add_argument("--json", action="store_true", help="print facts as JSON")
    parser.add_argument("--verbose", action="store_true", help="show tracebacks of errors")
    add_model_flags(parser)
    options = parser.parse_known_words(rest)
    config = engine_config(options, compilation)
    from onegraph.audit.audit import audit as audited
    from onegraph.audit.witness import Witness
    from onegraph.engine.startup import start_engine
    from onegraph.errors import ConfigError

    witness = Witness.configured(environment())
    assert isinstance(witness, Witness)
    start_engine(config, witness)
    if witness.call is None:
        raise ConfigError("with these flags nothing of ours is compiled, so there are no keys", where="audit")
    report = audited(witness.call, options.only, _progress)
    if options.json:
        print(json.dumps(report.to_dict(), indent=1))
    else:
        _tell(report, options.all)
    return 0 if report.ok else 1


def _progress(changes: Sequence[Perturbation]) -> Iterator[Perturbation]:
    from tqdm import tqdm

    with tqdm(total=len(changes), desc="audit", unit="change", disable=None, leave=False) as bar:
        for one in changes:
            bar.set_postfix_str(one.name)
            yield one
            bar.update()


def _tell(report: Report, all_of_them: bool) -> None:
    for one in report.judged:
        if all_of_them or one.verdict != "fine":
            index = "" if one.verdict == "refused" else f"; index: {one.index or 'the trace is taken'}"
            print(f"{one.verdict:<16}  {one.perturbation}: {one.why}{index if all_of_them else ''}")
    kept = f"; no trace is kept: {report.trace}" if report.trace else ""
    alike = f", {report.num_alike} more like another layer's" if report.num_alike else ""
    changed = sum(one.perturbation.name.startswith("value.") for one in report.judged)
    print(f"{report.model}, backend={report.backend}: {report.num_pieces} compiled pieces{kept}")
    print(f"the trace read {report.num_read} values, of which {changed} were changed{alike}")
    counts = ", ".join(f"{number} {name}" for name, number in report.counts.items())
    print(f"{len(report.judged)} changes: {counts}")
    print("all good" if report.ok else "something is wrong: keys, checks or declarations don't tell what is compiled")
