"""The flags of every command that loads a model, read into an EngineConfig.

`-O3`, `-O=3`, `-O.a=b`, `-O.a b`, `-O '{json}'` and `--compilation-config` are one setting, merged in the order
given; dashes and underscores are equal. Anything unknown is an error that names the nearest thing known.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from dataclasses import dataclass
from typing import Any

from onegraph.config.compilation import FIELDS, CompilationConfig, FieldInfo
from onegraph.config.engine import EngineConfig
from onegraph.errors import ConfigError, nearest


@dataclass(frozen=True)
class EngineFlag:
    """A flag for one field of EngineConfig; `kind` is bool for a switch."""

    field: str
    kind: type
    help: str


ENGINE_FLAGS = (
    EngineFlag("dtype", str, "auto (the checkpoint's), float32, bfloat16 or float16"),
    EngineFlag("device", str, "auto (the GPU where there is one), cpu or cuda"),
    EngineFlag("enforce_eager", bool, "no torch.compile, no CUDA graphs"),
    EngineFlag("max_model_len", int, "most tokens of a prompt with its output"),
    EngineFlag("max_num_seqs", int, "most sequences of one step"),
    EngineFlag("max_num_batched_tokens", int, "most tokens of one step"),
    EngineFlag("num_kv_blocks", int, "blocks of the KV cache (default: from the memory that is there)"),
    EngineFlag("block_size", int, "tokens of a KV block"),
    EngineFlag("enable_prefix_caching", bool, "prompts that begin alike share computed blocks (default: on)"),
    EngineFlag("tensor_parallel_size", int, "devices (this version: 1)"),
    EngineFlag("seed", int, "seed of requests that bring none"),
    EngineFlag("trust_remote_code", bool, "run Python code that comes with the model"),
    EngineFlag("artifact", str, "a file of `onegraph compile`; what it isn't for is refused"),
)
_DEFAULT_ON = ("enable_prefix_caching",)


class UsageError(Exception):
    """The command line can't be read: exit code 2."""


class Parser(argparse.ArgumentParser):
    """argparse with our way of failing: an exception with one message, and the nearest flag for an unknown one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> Any:
        raise UsageError(f"{self.prog}: {message}")

    def parse_known_words(self, words: Sequence[str]) -> argparse.Namespace:
        """Parses all words; dashes and underscores in flags are equal."""
        known = {option for action in self._actions for option in action.option_strings}
        spelled = []
        for word in words:
            name, equals, value = word.partition("=")
            if name.startswith("--"):
                name = name.replace("_", "-")
                if name not in known:
                    raise UsageError(f"{self.prog}: there is no flag {name}; {nearest(name, known)}")
            spelled.append(name + equals + value)
        return self.parse_args(spelled)


def add_model_flags(parser: Parser, *, model: bool = True) -> None:
    """Adds MODEL and the flags of EngineConfig and CompilationConfig, from their declarations."""
    if model:
        parser.add_argument(
            "model", nargs="?", metavar="MODEL", help="a folder or hub id (default: the built-in model)"
        )
    group = parser.add_argument_group("engine")
    for flag in ENGINE_FLAGS:
        option = "--" + flag.field.replace("_", "-")
        if flag.kind is bool:
            group.add_argument(option, action=argparse.BooleanOptionalAction, default=None, help=flag.help)
        else:
            group.add_argument(option, type=flag.kind, default=None, help=flag.help)
    width = max(map(len, FIELDS))
    fields = "\n".join(f"{name:<{width}}  {_about(info)}" for name, info in FIELDS.items())
    compilation = parser.add_argument_group(
        "compilation", f"-O3, -O.FIELD=VALUE, -O.FIELD VALUE or -O '{{json}}', where FIELD is one of\n\n{fields}"
    )
    compilation.add_argument("-O", "--compilation-config", dest="compilation", action="append", metavar="CONFIG")


def _about(info: FieldInfo) -> str:
    return f"{info.doc}: {', '.join(info.choices)}" if info.choices else info.doc


def split_compilation_words(words: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Takes the `-O…` and `--compilation-config` words out of a command line.

    Gives the other words, and the fields that were set. Raises UsageError or ConfigError.
    """
    rest: list[str] = []
    fields: dict[str, Any] = {}
    queue = list(words)
    while queue:
        word = queue.pop(0)
        name = word.partition("=")[0].replace("_", "-")
        if word == "--":
            return [*rest, word, *queue], fields
        if name in ("--compilation-config",):
            value = word.partition("=")[2] if "=" in word else _following(queue, word)
            _merge(fields, CompilationConfig.of(value).given())
        elif word.startswith("-O."):
            path, equals, value = word[3:].partition("=")
            _set(fields, path, value if equals else _value_after(queue, path, word))
        elif word.startswith("-O") and not word.startswith("--"):
            value = word[2:].removeprefix("=") or _following(queue, word)
            _merge(fields, CompilationConfig.of(value).given())
        else:
            rest.append(word)
    return rest, fields


def _following(queue: list[str], word: str) -> str:
    if not queue:
        raise UsageError(f"{word} needs a value")
    return queue.pop(0)


def _value_after(queue: list[str], path: str, word: str) -> str:
    """The value of `-O.path` that stands in the next word; a switch needs none."""
    info = FIELDS.get(path.replace("-", "_"))
    if info is not None and info.kind == "bool" and (not queue or not isinstance(_value(queue[0]), bool)):
        return "true"
    return _following(queue, word)


def _set(fields: dict[str, Any], path: str, text: str) -> None:
    name, *keys = path.replace("-", "_").split(".")
    if name not in FIELDS:
        raise ConfigError(f"CompilationConfig has no field {name!r}", where=f"-O.{path}", hint=nearest(name, FIELDS))
    value = _value(text)
    if keys:
        if not FIELDS[name].has_parts:
            raise ConfigError(
                f"{name} has no parts, and -O.{path} names one", where=f"-O.{path}", hint=f"-O.{name}=VALUE"
            )
        # Inductor's own options have dots in their names (cpp.threads): what follows is one key.
        value = {**fields.get(name, {}), ".".join(keys): value}
    fields.update(CompilationConfig.of({name: value}).given())  # null sets nothing


def _merge(fields: dict[str, Any], over: dict[str, Any]) -> None:
    for name, value in over.items():
        fields[name] = {**fields.get(name, {}), **value} if FIELDS[name].has_parts else value


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return {"True": True, "False": False}.get(text, text)


def json_alone(options: argparse.Namespace) -> AbstractContextManager[Any]:
    """Inside, what a model's code prints goes to stderr, if stdout is to have JSON alone."""
    return redirect_stdout(sys.stderr) if options.json else nullcontext()


def engine_config(options: argparse.Namespace, compilation: dict[str, Any]) -> EngineConfig:
    """The EngineConfig of parsed flags. Raises ConfigError."""
    given = {flag.field: getattr(options, flag.field) for flag in ENGINE_FLAGS}
    given = {name: value for name, value in given.items() if value is not None}
    return EngineConfig(
        model=getattr(options, "model", None), compilation_config=CompilationConfig.of(compilation), **given
    )


def llm_arguments(config: EngineConfig) -> dict[str, Any]:
    """The keyword arguments with which `LLM` is made of a config."""
    names = ("model", *(flag.field for flag in ENGINE_FLAGS), "compilation_config")
    return {name: getattr(config, name) for name in names}
