"""`onegraph cache`: what the compile cache holds, why it missed, whether it is whole, and how to move or empty it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onegraph.cli.cache_audit import ABOUT, audit
from onegraph.cli.flags import Parser, UsageError, add_model_flags, engine_config, split_compilation_words
from onegraph.env import environment
from onegraph.errors import ConfigError, nearest

if TYPE_CHECKING:
    from onegraph.explanation import RangeExplanation
    from onegraph.store.lookup import Lookup
    from onegraph.store.removal import Freed
    from onegraph.store.store import Store
    from onegraph.store.transfer import Contents

EXAMPLE = """example:
  onegraph cache ls
  onegraph cache why -O.inductor_compile_config.size_asserts=false

The folder is that of ONEGRAPH_CACHE_ROOT, and below it that of ONEGRAPH_CACHE_BASE. Each verb has --help and takes
--json and --verbose. docs/cache.md tells more.
"""
_SIZE = re.compile(r"(\d+(?:\.\d+)?) *([KMGT]?)(?:i?B)?", re.IGNORECASE)
_AGE = re.compile(r"(\d+(?:\.\d+)?) *([smhdw])", re.IGNORECASE)
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


def main(words: list[str]) -> int:
    """See `onegraph cache --help`."""
    if not words or words[0] not in VERBS:
        if words and not words[0].startswith("-"):
            raise UsageError(f"onegraph cache: there is no verb {words[0]!r}; {nearest(words[0], VERBS)}")
        width = max(map(len, VERBS))
        verbs = "\n".join(f"  {name:<{width}}  {about}" for name, (_, about) in VERBS.items())
        usage = "onegraph cache VERB …"
        parser = Parser(prog="onegraph cache", usage=usage, description=f"verbs:\n{verbs}", epilog=EXAMPLE)
        _add_output_flags(parser)
        parser.parse_known_words(words)
        raise UsageError(f"onegraph cache: which verb? {', '.join(VERBS)}")
    return VERBS[words[0]][0](words[1:])


def ls(words: list[str]) -> int:
    """Lists entries."""
    options = _parser("ls", "onegraph cache ls --json | jq '.entries[0]'").parse_known_words(words)
    from onegraph.store.listing import entries

    store = _store()
    found = entries(store)
    if options.json:
        return _print({"root": str(store.root), "base": _text(store.base), "entries": [one.to_dict() for one in found]})
    print(f"{'key':<12}  {'kind':<10}  {'created':<16}  {'last used':<16}  {'size':>9}  {'compiled':>8}  what")
    for one in found:
        notes = [f"bad: {one.problem}" if one.problem else one.what, *(["base"] if one.layer == "base" else [])]
        print(
            f"{one.key[:12]}  {one.kind:<10}  {_minute(one.created)}  {_minute(one.last_used)}  "
            f"{_bytes(one.size_bytes):>9}  {one.seconds:>6.1f} s  {', '.join(notes)}"
        )
    print(f"{_number(len(found), 'entry')} in {store.root}" + (f", over {store.base}" if store.base else ""))
    return 0


def why(words: list[str]) -> int:
    """Looks up a model's pieces."""
    rest, compilation = split_compilation_words(words)
    parser = _parser("why", "onegraph cache why --json | jq '.pieces[].differs'")
    add_model_flags(parser)
    options = parser.parse_known_words(rest)
    lookup = _lookup()
    pieces = _looked_up(engine_config(options, compilation), lookup)
    if options.json:
        return _print({"pieces": [facts for _, facts in pieces]})
    for shown, facts in pieces:
        twin = "" if facts["same_as"] is None else f" (as piece {facts['same_as']})"
        print(f"piece {facts['index']}{facts['where']}{twin}  {shown.store}: {shown.why}")
    print("\n".join(_summed(pieces)) if pieces else "nothing is compiled with these flags")
    return 0


def verify(words: list[str]) -> int:
    """Checks everything."""
    rest, compilation = split_compilation_words(words)
    parser = _parser("verify", "onegraph cache verify --recompile 2 --dtype float32")
    parser.add_argument(
        "--recompile", type=_count, default=0, metavar="N", help="compile N pieces of MODEL afresh, and compare"
    )
    add_model_flags(parser)
    options = parser.parse_known_words(rest)
    config = engine_config(options, compilation)
    if not options.recompile and (compilation or config != engine_config(parser.parse_known_words([]), {})):
        raise UsageError("onegraph cache verify: MODEL and its flags are for --recompile N")
    from onegraph.store.verify import verify as verified

    found = verified(_store(), _progress)
    facts = found.to_dict() | {"recompiled": []}
    if options.recompile:
        lookup = _lookup(options.recompile)
        _looked_up(config, lookup)
        facts["recompiled"] = [one.to_dict() for one in lookup.recompiled]
        facts["ok"] = facts["ok"] and not any(one.problem for one in lookup.recompiled)
    if options.json:
        _print(facts)
        return 0 if facts["ok"] else 1
    for where, problem in found.problems:
        print(f"BAD  {where}: {problem}")
    for one in facts["recompiled"]:
        numbers = "" if one["max_difference"] is None else f", numbers at most {one['max_difference']:.2g} apart"
        told = one["problem"] or f"compiled afresh in {one['seconds']:.1f} s, the same code{numbers}"
        print(f"{'BAD ' if one['problem'] else 'ok  '} piece {one['piece']}, {one['key'][:12]}: {told}")
    if len(facts["recompiled"]) < options.recompile:
        print(f"only {len(facts['recompiled'])} of {options.recompile} recompiled: the others aren't in the cache")
    orphans = f"; {_number(len(found.orphans), 'orphan')} of {_bytes(found.orphan_bytes)}" if found.orphans else ""
    counted = f"{_number(found.num_entries, 'entry')}, {_number(found.num_files, 'file')}"
    print(f"{counted}, {_bytes(found.size_bytes)}{orphans}; signatures {found.signatures}")
    print("all good" if facts["ok"] else "something is wrong: bad entries are compiled again when they are met")
    return 0 if facts["ok"] else 1


def prune(words: list[str]) -> int:
    """Removes what was used longest ago."""
    parser = _parser("prune", "onegraph cache prune --max-size 2G --max-age 30d")
    parser.add_argument("--max-size", type=_size, metavar="SIZE", help="keep at most that much: 500M, 2G")
    parser.add_argument("--max-age", type=_age, metavar="AGE", help="keep what was used since: 12h, 30d, 8w")
    options = parser.parse_known_words(words)
    if options.max_size is None and options.max_age is None:
        raise UsageError("onegraph cache prune: give --max-size, --max-age, or both")
    from onegraph.store.removal import prune as pruned

    root = _store().root
    return _freed(pruned(root, max_bytes=options.max_size, max_age_s=options.max_age), root, options.json)


def clear(words: list[str]) -> int:
    """Empties the root."""
    parser = _parser("clear", "onegraph cache clear")
    parser.add_argument("--edits", action="store_true", help="only edited artifacts, in ROOT/unpacked")
    options = parser.parse_known_words(words)
    from onegraph.store.removal import clear as cleared

    root = _store().root
    return _freed(cleared(root, edits_only=options.edits), root, options.json)


def export(words: list[str]) -> int:
    """Writes an archive."""
    parser = _parser("export", "onegraph cache export artifacts.zip")
    parser.add_argument("file", metavar="FILE", type=Path, help="the zip archive to write")
    parser.add_argument("--key", action="append", default=[], help="only this entry; more than one may be given")
    options = parser.parse_known_words(words)
    from onegraph.store.transfer import export as exported

    store = _store()
    contents = exported(store, options.file, options.key)
    if options.json:
        return _print(contents.to_dict())
    print(f"{_told(contents)} written to {options.file}, {_bytes(options.file.stat().st_size)}")
    return 0


def import_(words: list[str]) -> int:
    """Takes what is in an archive."""
    parser = _parser("import", "onegraph cache import artifacts.zip --dry-run")
    parser.add_argument("file", metavar="FILE", type=Path, help="an archive of `onegraph cache export`")
    parser.add_argument("--dry-run", action="store_true", help="verify it and tell what is in it, and import nothing")
    options = parser.parse_known_words(words)
    from onegraph.store.transfer import import_archive

    store = _store()
    if not options.dry_run:
        store.open_root()
    contents = import_archive(store, options.file, dry_run=options.dry_run)
    if options.json:
        return _print(contents.to_dict())
    for one in contents.entries:
        notes = [
            *(["not signed"] if one.signature is None else []),
            *(["already here"] if one.key in contents.had else []),
        ]
        print(f"{one.key[:12]}  {one.kind:<10}  {_minute(one.created)}  {', '.join([_what(one), *notes])}")
    new = len(contents.entries) - len(contents.had)
    done = "would be imported" if options.dry_run else "imported"
    print(f"{_told(contents)}, all verified; {new} new {done} into {store.root}")
    return 0


VERBS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "ls": (ls, "the entries, newest first"),
    "why": (why, "which pieces of a model it has, and for the others the nearest entry and what differs"),
    "verify": (verify, "check manifests, checksums, signatures, owners and modes; exit code 1 if one is wrong"),
    "audit": (audit, ABOUT),
    "prune": (prune, "remove what was used longest ago, down to a size or an age"),
    "clear": (clear, "remove all under the root"),
    "export": (export, "write entries into one file"),
    "import": (import_, "take the entries of such a file, verified"),
}


def _parser(verb: str, example: str) -> Parser:
    about = VERBS[verb][1]
    parser = Parser(
        prog=f"onegraph cache {verb}", description=f"{about[0].upper()}{about[1:]}.", epilog=f"example:\n  {example}\n"
    )
    _add_output_flags(parser)
    return parser


def _add_output_flags(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="print facts as JSON")
    parser.add_argument("--verbose", action="store_true", help="show tracebacks of errors")


def _store() -> Store:
    """The store as it is: nothing is made."""
    from onegraph.store.store import Store

    store = Store.configured(environment())
    store.open_base()
    return store


def _lookup(num_recompiled: int = 0) -> Lookup:
    from onegraph.store.lookup import Lookup

    current = environment()
    if current.disable_compile_cache:
        raise ConfigError("the compile cache is off", where="ONEGRAPH_DISABLE_COMPILE_CACHE", hint="leave it out")
    return Lookup.configured(current, num_recompiled)


def _looked_up(config: Any, lookup: Lookup) -> list[tuple[RangeExplanation, dict[str, Any]]]:
    """For each compiled piece and each of its ranges, what the store has."""
    from onegraph.engine.startup import start_engine

    explanation = start_engine(config, lookup).explain()
    found = []
    for piece in explanation.pieces:
        for shown in piece.ranges if piece.backend == "inductor" else ():
            asked = lookup.asked.get(shown.key) if shown.key and shown.store == "miss" else None
            near = None if asked is None else lookup.nearest(asked)
            facts = {
                "index": piece.index,
                "where": f", where {shown.predicate}" if shown.predicate else "",
                "same_as": piece.same_as,
                "store": shown.store,
                "key": shown.key,
                "why": shown.why,
                "nearest": None if near is None else near.manifest.key,
                "differs": [] if near is None else [one.to_dict() for one in near.differs],
            }
            found.append((shown, facts))
    return found


def _summed(pieces: list[tuple[RangeExplanation, dict[str, Any]]]) -> list[str]:
    counts = {name: sum(shown.store == name for shown, _ in pieces) for name in ("hit", "miss", "stale", "off")}
    return [", ".join(f"{number} {name}" for name, number in counts.items() if number)]


def _progress(items: Iterable[str], what: str) -> Iterable[str]:
    from tqdm import tqdm

    bar: Iterable[str] = tqdm(list(items), desc=what, unit="entry", disable=None, leave=False)
    return bar


def _freed(freed: Freed, root: Path, as_json: bool) -> int:
    if as_json:
        return _print({"root": str(root), **freed.to_dict()})
    print(f"removed {_number(freed.entries, 'entry')}, {_bytes(freed.size_bytes)}, from {root}")
    print(f"left {_number(freed.left_entries, 'entry')}, {_bytes(freed.left_bytes)}")
    return 0


def _told(contents: Contents) -> str:
    records = f" and {_number(contents.num_records, 'record')} of choices" if contents.num_records else ""
    return f"{_number(len(contents.entries), 'entry')}{records}, {_bytes(contents.size_bytes)}"


def _what(manifest: Any) -> str:
    from onegraph.store.listing import described

    return described(manifest)


def _print(facts: Any) -> int:
    print(json.dumps(facts, indent=1))
    return 0


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _minute(time: str | None) -> str:
    return (time or "")[:16].replace("T", " ").ljust(16)


def _number(count: int, noun: str) -> str:
    plural = noun if count == 1 else noun[:-1] + "ies" if noun.endswith("y") else noun + "s"
    return f"{count} {plural}"


def _bytes(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"


def _count(text: str) -> int:
    if not text.isdecimal():
        raise UsageError(f"{text!r} is no number of pieces")
    return int(text)


def _size(text: str) -> int:
    found = _SIZE.fullmatch(text)
    if found is None:
        raise UsageError(f"{text!r} is no size: 500M, 2G")
    return int(float(found[1]) * 2 ** (10 * " KMGT".index(found[2].upper() or " ")))


def _age(text: str) -> float:
    found = _AGE.fullmatch(text)
    if found is None:
        raise UsageError(f"{text!r} is no age: 90s, 12h, 30d, 8w")
    return float(found[1]) * _SECONDS[found[2].lower()]
