"""`onegraph serve`: an OpenAI-compatible server for one model."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import termios
import time
from dataclasses import fields
from typing import Any

from onegraph.cli.flags import Parser, add_model_flags, engine_config, split_compilation_words
from onegraph.config.compilation import CompilationConfig
from onegraph.config.engine import EngineConfig
from onegraph.config.resolve import resolve
from onegraph.env import environment
from onegraph.errors import ServeError
from onegraph.log import set_level
from onegraph.serve.settings import ServeSettings
from onegraph.targets import device_rules, resolve_device
from onegraph.timeline import timeline
from onegraph.version import __version__

EXAMPLE = """example:
  onegraph serve --port 8000 --api-key secret
  curl 127.0.0.1:8000/v1/completions -H "Authorization: Bearer secret" \\
    -H "Content-Type: application/json" -d '{"prompt": "def ", "max_tokens": 40}'
"""


def main(words: list[str]) -> int:
    """See `onegraph serve --help`. Ctrl-C and SIGTERM drain and exit 0; a second one ends at once."""
    config, settings, as_json = parsed(words)
    if (level := environment().log_level) != "WARNING":
        set_level(level)
    try:
        timeline.imports("torch")
        timeline.imports("onegraph.models", "transformers")
        timeline.imports("onegraph.serve.server")
        from onegraph.serve.server import Server
    except ImportError as error:
        raise ServeError(
            f"the server's packages are missing: {error}",
            where="onegraph serve",
            hint="install the extra: pip install 'onegraph[serve]'",
        ) from error
    server = Server(config, settings, told=_Teller(as_json))
    terminal = termios.tcgetattr(sys.stdin) if _has_terminal() else None
    code = server.serve()
    if server.client.thread.is_alive:
        # It compiles, which nothing can interrupt, or stands at a breakpoint, whose prompt has the terminal; waiting
        # for it would keep a stopped server alive for minutes.
        if terminal is not None:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, terminal)
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _has_terminal() -> bool:
    return sys.stdin is not None and not sys.stdin.closed and sys.stdin.isatty()


def parsed(words: list[str]) -> tuple[EngineConfig, ServeSettings, bool]:
    """The engine's and the server's settings, and whether events are told as JSON.

    Raises UsageError and ConfigError, also for what can't be honoured: before a model is loaded for it.
    """
    rest, compilation = split_compilation_words(words)
    parser = Parser(
        prog="onegraph serve",
        description="Serves a model: /v1/models, /v1/completions, /v1/chat/completions as OpenAI's API has them; "
        "/health, /ready, /explain, /profile, /metrics, /version. Ctrl-C drains.",
        epilog=EXAMPLE,
    )
    add_model_flags(parser)
    _add_server_flags(parser)
    parser.add_argument("--json", action="store_true", help="print what happens as one JSON object a line")
    parser.add_argument("--verbose", action="store_true", help="show tracebacks of errors")
    options = parser.parse_known_words(rest)
    config = engine_config(options, compilation)
    resolve(
        CompilationConfig.of(config.compilation_config),
        rules=device_rules(resolve_device(config.device), batches=True),
        environment=environment(),
        enforce_eager=config.enforce_eager,
    )
    return config, _settings(options), options.json


def _add_server_flags(parser: Parser) -> None:
    group = parser.add_argument_group("server")
    for one in fields(ServeSettings):
        several, kind = one.metadata["several"], one.metadata["kind"]
        default = "" if several else f" (default: {one.default:g})" if kind is not str else f" (default: {one.default})"
        group.add_argument(
            "--" + one.name.replace("_", "-"),
            type=kind,
            action="append" if several else "store",
            default=None,
            help=one.metadata["help"] + default,
        )


def _settings(options: argparse.Namespace) -> ServeSettings:
    given: dict[str, Any] = {one.name: getattr(options, one.name) for one in fields(ServeSettings)}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return ServeSettings(**{name: value for name, value in given.items() if value is not None})


class _Teller:
    """Prints what happens: lines for people, or one JSON object a line."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._began = time.monotonic()

    def __call__(self, event: str, facts: dict[str, Any]) -> None:
        started = facts.pop("started", None)
        seconds = round(time.monotonic() - self._began, 2)
        if self._as_json:
            print(json.dumps({"event": event, "seconds": seconds, **facts}), flush=True)
            return
        if event == "listening":
            print(f"onegraph {__version__} at {facts['url']}, loading {facts['models'][0]} ...", flush=True)
        elif event == "ready":
            from onegraph.engine.summary import summarise

            print(summarise(started))
            print(f"ready     {facts['url']}/v1 after {seconds:.1f} s; Ctrl-C drains and ends", flush=True)
        else:
            print(
                f"draining  {facts['in_flight']} requests in flight, at most {facts['timeout_s']:g} s; "
                "again to end at once",
                flush=True,
            )
