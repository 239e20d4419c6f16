"""`onegraph bench`: how fast a model generates here, and with --profile where a step's time goes."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onegraph.cli.flags import (
    Parser,
    UsageError,
    add_model_flags,
    engine_config,
    json_alone,
    llm_arguments,
    split_compilation_words,
)
from onegraph.errors import ConfigError

if TYPE_CHECKING:
    from onegraph import LLM
    from onegraph.engine.outputs import RequestOutput
    from onegraph.ir.step_profile import StepProfile

EXAMPLE = """example:
  onegraph bench --requests 8 --prompt-len 128 --output-len 64 --profile --perfetto steps.json
"""
_COUNTS = {
    "requests": (8, 1, "prompts of a round"),
    "prompt_len": (128, 1, "tokens of each prompt"),
    "output_len": (64, 3, "tokens of each output"),
    "rounds": (3, 1, "rounds that are measured, after one that isn't"),
}
"""Flag: its default, the least that it takes, and what it is."""


def main(words: list[str]) -> int:
    """See `onegraph bench --help`."""
    rest, compilation = split_compilation_words(words)
    options = _parser().parse_known_words(rest)
    for name, (_, least, _) in _COUNTS.items():
        if getattr(options, name) < least:
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"onegraph bench: {flag} takes {least} or more, not {getattr(options, name)}")
    file = _place(options)
    config = engine_config(options, compilation)

    from onegraph import LLM

    with json_alone(options):
        llm = LLM(**llm_arguments(config))
    longest, asked = llm.engine.limits.max_model_len, options.prompt_len + options.output_len
    if asked > longest:
        raise ConfigError(
            f"prompt and output have {asked} tokens, and a text of this model at most {longest}",
            where="--prompt-len and --output-len",
            hint="give less, or a larger --max-model-len where the model allows it",
        )
    if not options.json:
        print(llm.summary(), flush=True)
    rounds = Rounds(llm, options.requests, options.prompt_len, options.output_len)
    with json_alone(options):
        facts = rounds.measured(options.rounds)
        profiles = rounds.profiled() if options.profile else {}
    if options.json:
        shown = {name: profile.to_dict() for name, profile in profiles.items()}
        print(json.dumps({**facts, "profile": shown or None}, indent=1), flush=True)
    else:
        print("\n" + "\n".join(_lines(facts)))
        for name, profile in profiles.items():
            print(f"\n{name}: {profile}", flush=True)
    if file is not None:  # after what was measured: the disk may be full
        _write(file, profiles)
        if not options.json:
            print(f"\nfor ui.perfetto.dev: {file}")
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="onegraph bench",
        description="Generates for prompts of made-up tokens, all at once, as LLM.generate does, and tells tokens/s, "
        "the milliseconds of a step in which all decode, and the time to the first token: medians over some rounds, "
        "with their spread.",
        epilog=EXAMPLE,
    )
    add_model_flags(parser)
    for name, (default, _, text) in _COUNTS.items():
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=int, default=default, metavar="N", help=f"{text} (default {default})")
    parser.add_argument(
        "--profile", action="store_true", help="also tell where a step's time goes: of the prefill, and of decoding"
    )
    parser.add_argument("--perfetto", metavar="FILE", help="write the profile's steps for ui.perfetto.dev")
    parser.add_argument("--json", action="store_true", help="print facts as JSON")
    parser.add_argument("--verbose", action="store_true", help="show tracebacks of errors")
    return parser


def _place(options: argparse.Namespace) -> Path | None:
    """Where the timeline goes. Raises before a model is loaded for what can't be written."""
    if options.perfetto is None:
        return None
    if not options.profile:
        raise UsageError("onegraph bench: --perfetto writes what --profile measures: give both")
    file = Path(options.perfetto)
    if file.is_dir() or not file.absolute().parent.is_dir():
        raise ConfigError(f"{file} is no file in a folder that is there", where="--perfetto", hint="make the folder")
    return file


class Rounds:
    """Rounds with the same numbers of tokens, and new prompts each, of which the prefix cache has none."""

    def __init__(self, llm: LLM, num_requests: int, prompt_len: int, output_len: int) -> None:
        from onegraph import SamplingParams

        self._llm = llm
        self._num_requests = num_requests
        self._prompt_len = prompt_len
        self._output_len = output_len
        self._num_prompts = 0
        self._params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True)

    def measured(self, num_rounds: int) -> dict[str, Any]:
        """The figures."""
        self._round()
        rates: list[float] = []
        steps_ms: list[float] = []
        first_ms: list[float] = []
        for _ in range(num_rounds):
            began = time.perf_counter()
            decodes, firsts = self._round()
            rates.append(self._num_requests * self._output_len / (time.perf_counter() - began))
            steps_ms += [1000 * seconds for seconds in decodes]
            first_ms += [1000 * seconds for seconds in firsts]
        return {
            "model": self._llm.explain().model,
            "requests": self._num_requests,
            "prompt_len": self._prompt_len,
            "output_len": self._output_len,
            "rounds": num_rounds,
            "output_tokens_per_s": _spread(rates),
            "decode_step_ms": _spread(steps_ms) if steps_ms else None,
            "first_token_ms": _spread(first_ms),
        }

    def profiled(self) -> dict[str, StepProfile]:
        """A profile of the steps of one round until all decode, and one of the steps in which they do."""
        from onegraph.engine.step_profile import StepProfiler

        engine, left = self._llm.engine, self._output_len - 1
        self._queue()
        with StepProfiler(engine) as prefill:
            all_decode = False
            while engine.has_unfinished() and not all_decode:
                done = self._stepped(prefill.step())
                all_decode, left = done.all_decode, left - (done.num_new > 0)
        with StepProfiler(engine) as decode:
            for _ in range(left if all_decode else 0):  # until the first one ends
                self._stepped(decode.step())
        while engine.has_unfinished():
            engine.step()
        profilers = {"prefill": prefill, "decode": decode}  # a trace shows the last one
        return {name: profiler.profile() for name, profiler in profilers.items() if profiler.num_steps}

    def _round(self) -> tuple[list[float], list[float]]:
        """The seconds of each step in which all decode and none ends, and of each request until its first token."""
        self._queue()
        decodes: list[float] = []
        firsts: list[float] = []
        decode_next = False
        while self._llm.engine.has_unfinished():
            done = self._stepped(nullcontext())
            if decode_next and not done.outputs:
                decodes.append(done.seconds)
            decode_next = done.all_decode
            times = [one.metrics for one in done.outputs]
            firsts += [one.first_token_s - one.arrival_s for one in times if one.first_token_s is not None]
        return decodes, firsts

    def _queue(self) -> None:
        """A round's requests, which no step has seen."""
        for _ in range(self._num_requests):
            self._num_prompts += 1
            self._llm.engine.add_request(f"bench {self._num_prompts}", self._prompt(self._num_prompts), self._params)

    def _prompt(self, number: int) -> list[int]:
        most = self._llm.engine.vocab_size
        return [(number * 131 + place * (number % 89 + 7)) % most for place in range(self._prompt_len)]

    def _stepped(self, around: AbstractContextManager[Any]) -> _Step:
        engine = self._llm.engine
        before, began = engine.stats.num_generated_tokens, time.perf_counter()
        with around:
            outputs = engine.step()
        seconds, new = time.perf_counter() - began, engine.stats.num_generated_tokens - before
        return _Step(outputs, seconds, new, new == self._num_requests)


@dataclass(frozen=True)
class _Step:
    """A step that ran: `num_new` tokens; one for each request, so that all decode in the next, if `all_decode`."""

    outputs: list[RequestOutput]
    seconds: float
    num_new: int
    all_decode: bool


def _spread(values: list[float]) -> dict[str, float]:
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    figures = {"median": quartiles[1], "q1": quartiles[0], "q3": quartiles[2], "min": min(values), "max": max(values)}
    return {name: round(value, 4) for name, value in figures.items()}


def _lines(facts: dict[str, Any]) -> list[str]:
    told = f"{facts['requests']} requests of {facts['prompt_len']} + {facts['output_len']} tokens"
    rows = (
        ("output tokens/s", "output_tokens_per_s", f"{facts['rounds']} rounds"),
        ("decode step, ms", "decode_step_ms", "all requests decode"),
        ("first token, ms", "first_token_ms", "from the call, all at once"),
    )
    lines = [f"{told:<46} {'median':>9} {'quartiles':>19} {'min':>9} {'max':>9}"]
    for name, key, text in rows:
        one = facts[key]
        if one is None:
            lines.append(f"{name}: no step had all requests decode; the KV cache, or a step, holds fewer")
            continue
        middle = f"{one['q1']:.2f}..{one['q3']:.2f}"
        figures = f"{one['median']:>9.2f} {middle:>19} {one['min']:>9.2f} {one['max']:>9.2f}"
        lines.append(f"{f'{name} ({text})':<46} {figures}")
    return lines


def _write(file: Path, profiles: dict[str, StepProfile]) -> None:
    """One timeline for all, each a process of its own."""
    events: list[dict[str, Any]] = []
    for number, (name, profile) in enumerate(profiles.items(), start=1):
        events.append({"ph": "M", "name": "process_name", "pid": number, "tid": 0, "ts": 0, "args": {"name": name}})
        events += [{**event, "pid": number} for event in profile.perfetto()["traceEvents"]]
    try:
        file.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
    except OSError as error:
        if file.is_file():
            file.unlink(missing_ok=True)  # a half of it
        raise ConfigError(f"{file} can't be written: {error.strerror}", where="--perfetto") from error
