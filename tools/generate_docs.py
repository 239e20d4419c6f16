"""Writes docs/options.md and docs/errors.md from the code that they describe. `--check` only compares.

Takes the declarations of CompilationConfig, EngineConfig's flags, the environment variables and the error
classes. A test runs the check, so that the pages can't fall behind.
"""

from __future__ import annotations

import sys
from dataclasses import fields, replace
from pathlib import Path

from onegraph import errors
from onegraph.cli.flags import ENGINE_FLAGS
from onegraph.config.compilation import FIELDS, CompilationConfig, CompilationMode, CUDAGraphMode
from onegraph.config.resolve import ALWAYS, DEFAULT_LEVEL, LEVEL_MODES, DeviceRules, resolve
from onegraph.env import VARIABLES, environment
from onegraph.serve.settings import ServeSettings

DOCS = Path(__file__).parents[1] / "docs"
CPU = DeviceRules("cpu", frozenset({CUDAGraphMode.NONE}), CUDAGraphMode.NONE)
KINDS = {
    "int": "whole number",
    "bool": "true, false",
    "ints": "list of whole numbers",
    "sizes": "list of whole numbers",
    "ranges": "list of endpoints or pairs",
    "strs": "list of names",
    "counts": "object of sizes and numbers",
    "dict": "object",
    "policies": "object",
}
HEAD = "<!-- Written by tools/generate_docs.py; edit the code, then run it. -->\n"


def options_page() -> str:
    """Flags, fields, levels and variables, one table each."""
    lines = [HEAD, "# Options", ""]
    lines += ["`onegraph config [flags]` prints the effective value of each and why it has it.", ""]
    lines += [
        "## Compilation",
        "",
        "In Python `CompilationConfig(FIELD=...)`, on the command line `-O.FIELD=VALUE`.",
        "",
    ]
    lines += ["| field | values | default | affects | what it does |", "|---|---|---|---|---|"]
    for name, info in FIELDS.items():
        values = ", ".join(f"`{choice}`" for choice in info.choices) or KINDS[info.kind]
        default = f"`{ALWAYS[name]!r}`" if name in ALWAYS else "by level"
        lines.append(f"| `{name}` | {values} | {default} | {info.affects} | {info.doc} |")
    lines += ["", "## Levels", "", "| level | mode | backend | Inductor's options |", "|---|---|---|---|"]
    plain = replace(environment(), compilation_config=None, compile_cache_save_format=None)
    for level in range(len(LEVEL_MODES)):
        at = resolve(CompilationConfig(level=level), rules=CPU, environment=plain)
        name = f"`-O{level}`" + (" (default)" if level == DEFAULT_LEVEL else "")
        options = f"`{dict(at.inductor_compile_config)}`" if at.inductor_compile_config else ""
        lines.append(f"| {name} | {at.mode.name} | {at.backend} | {options} |")
    lines += [
        "",
        f"Modes: {', '.join(f'{m.name} = {m.value}' for m in CompilationMode)}. "
        f"CUDA graph modes: {', '.join(m.name for m in CUDAGraphMode)}; without a word NONE on every device.",
        "",
        "## Engine",
        "",
        "In Python arguments of `LLM`, on the command line `--name`; dashes and underscores are equal.",
        "",
        "| flag | what it does |",
        "|---|---|",
    ]
    lines += [f"| `--{flag.field.replace('_', '-')}` | {flag.help} |" for flag in ENGINE_FLAGS]
    lines += ["", "## Server", "", "Flags of `onegraph serve` beside those above.", ""]
    lines += ["| flag | default | what it does |", "|---|---|---|"]
    for setting in fields(ServeSettings):
        default = "" if setting.metadata["several"] else f"`{setting.default}`"
        lines.append(f"| `--{setting.name.replace('_', '-')}` | {default} | {setting.metadata['help']} |")
    lines += ["", "## Environment", "", "| variable | what it does |", "|---|---|"]
    lines += [f"| `{name}` | {text} |" for name, text in VARIABLES.items()]
    return "\n".join(lines) + "\n"


def errors_page() -> str:
    """Each error class under its code."""
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.OnegraphError)]
    lines = [HEAD, "# Errors", "", "Each message says what failed, where, and what to do, behind a stable code.", ""]
    for error in classes:
        lines += [f"## {error.code}", "", f"`onegraph.errors.{error.__name__}`: {error.__doc__}", ""]
    return "\n".join(lines).rstrip() + "\n"


def main() -> int:
    """Writes the pages, or with `--check` says which are out of date and exits with 1."""
    stale = []
    for name, text in (("options.md", options_page()), ("errors.md", errors_page())):
        path = DOCS / name
        if not path.exists() or path.read_text() != text:
            stale.append(name)
            if "--check" not in sys.argv:
                path.write_text(text)
    if "--check" in sys.argv and stale:
        print(f"out of date: {', '.join(stale)}; run python tools/generate_docs.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
