"""How the time of a decode step divides: scheduler, input preparation, model, sampling, postprocess.

usage: python -m bench.step_overhead [--shape 135m] [--requests 64] [--steps 63] [--rounds 2] [--name NAME] [--out FILE]

Takes `LLM`'s engine and wraps its methods from outside. All requests decode: steps with a prefill, and steps in which
a request ends, aren't counted. `plain` is what `LLM` does, whose texts are decoded at the end; with `streaming`, as
a server has it, each step decodes its tokens and makes an output for each request. Modes alternate.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

from bench.__main__ import RESULTS, environment
from bench.figures import summary
from bench.models import SHAPES, make_model
from onegraph import LLM, SamplingParams
from onegraph.engine.detokenizer import Detokenizer
from onegraph.targets.cpu.tape import TapeRecording

PROMPT_LEN = 128
WRAPPED = {
    "step": "step",
    "schedule": "_scheduler.schedule",
    "run": "_runner.run",
    "dispatch": "_runner._dispatcher.decide",
    "model": "_runner._forward",
    "sample": "_sampler",
    "postprocess": "_postprocess",
    "outputs": "_output",
}
"""Part: the engine's method; `model` and `dispatch` are within `run`, `outputs` within `postprocess`, all in `step`.

`replay`, within `model`, is the kernels of a recording, and what is called between them."""


class Clock:
    """The seconds of each wrapped function in the current step, summed over its calls."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def wrap(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose time is added to `part`."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - began

        return timed


def wrap_engine(engine: Any, clock: Clock) -> None:
    """Replaces the methods in WRAPPED and the detokeniser's. AttributeError: the engine has changed, so must this."""
    for part, path in WRAPPED.items():
        owner, *names = engine, *path.split(".")
        for name in names[:-1]:
            owner = getattr(owner, name)
        setattr(owner, names[-1], clock.wrap(part, getattr(owner, names[-1])))
    replay = TapeRecording.replay
    TapeRecording.replay = lambda self: replayed(self)  # type: ignore[method-assign]
    replayed = clock.wrap("replay", replay)
    append = Detokenizer.append
    Detokenizer.append = lambda self, token_id: timed(self, token_id)  # type: ignore[method-assign]
    timed = clock.wrap("detokenise", append)


def split_step(seconds: dict[str, float]) -> dict[str, float]:
    """Milliseconds of the parts, which add up to the step; what of it is outside the model, and outside a replay."""
    ms = {part: 1000 * seconds.get(part, 0.0) for part in (*WRAPPED, "replay", "detokenise")}
    parts = {
        "scheduler": ms["schedule"],
        "dispatch": ms["dispatch"],
        "input_preparation": ms["run"] - ms["model"] - ms["dispatch"],
        "model_without_replay": ms["model"] - ms["replay"],
        "replay": ms["replay"],
        "sampling": ms["sample"],
        "detokenise": ms["detokenise"],
        "outputs": ms["outputs"],
        "postprocess_rest": ms["postprocess"] - ms["detokenise"] - ms["outputs"],
        "rest": ms["step"] - ms["schedule"] - ms["run"] - ms["sample"] - ms["postprocess"],
    }
    return {
        "step": ms["step"],
        **parts,
        "outside_replay": ms["step"] - ms["replay"],
        "share_outside_model": 1 - ms["model"] / ms["step"],
    }


def decode_steps(
    engine: Any, clock: Clock, prompts: list[list[int]], num_tokens: int, stream: bool
) -> list[dict[str, float]]:
    """The split of each step in which all requests decode one token and none ends."""
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    for number, prompt in enumerate(prompts):
        engine.add_request(f"{number}", prompt, params, stream=stream)
    found: list[dict[str, float]] = []
    generated = engine.stats.num_generated_tokens
    before_all_decode = True
    while engine.has_unfinished():
        clock.seconds.clear()
        outputs = engine.step()
        new, generated = engine.stats.num_generated_tokens - generated, engine.stats.num_generated_tokens
        all_decode = new == len(prompts) and not any(output.finished for output in outputs)
        if all_decode and not before_all_decode:
            found.append(split_step(clock.seconds))
        before_all_decode = not all_decode  # the first full step may still hold the last prompts
    return found


def measure(shape: str, num_requests: int, num_steps: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Medians and spread of each part over the steps of all rounds."""
    llm = LLM(str(make_model(shape, folder)), max_model_len=1024)
    clock, rng = Clock(), random.Random(0)
    wrap_engine(llm.engine, clock)

    def prompts() -> list[list[int]]:
        vocab_size = SHAPES[shape]["vocab_size"]
        return [[rng.randrange(1, vocab_size) for _ in range(PROMPT_LEN)] for _ in range(num_requests)]

    modes: dict[str, list[dict[str, float]]] = {"plain": [], "streaming": []}
    decode_steps(llm.engine, clock, prompts(), 8, stream=False)
    for number in range(rounds):
        for mode in list(modes) if number % 2 == 0 else list(reversed(modes)):
            steps = decode_steps(llm.engine, clock, prompts(), num_steps + 2, stream=mode == "streaming")
            modes[mode] += steps
            print(f"{mode}: {len(steps)} steps", file=sys.stderr, flush=True)
    return {mode: {part: summary([step[part] for step in steps]) for part in steps[0]} for mode, steps in modes.items()}


def table(modes: dict[str, Any]) -> str:
    """Medians in ms, and the share of the step's median."""
    lines = [f"{'ms':<22}" + "".join(f"{mode:>24}" for mode in modes)]
    for part in next(iter(modes.values())):
        cells = []
        for found in modes.values():
            median = found[part]["median"]
            share = median if part == "share_outside_model" else median / found["step"]["median"]
            cells.append(f"{'' if part == 'share_outside_model' else f'{median:.3f}':>14}{share:>9.1%} ")
        lines.append(f"{part:<22}{''.join(cells)}")
    return "\n".join(lines)


def main() -> int:
    """Measures, writes bench/results/DATE-step-overhead[-NAME].json, prints a table."""
    parser = argparse.ArgumentParser(prog="python -m bench.step_overhead", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="135m", choices=sorted(SHAPES))
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--steps", type=int, default=63, help="about how many counted steps in each round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--name", default="", help="ends the file's name, where a day has several runs")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    stem = "-".join(part for part in (date.today().isoformat(), "step-overhead", options.name) if part)
    out = options.out or RESULTS / f"{stem}.json"
    if out.exists():
        parser.error(f"{out.name} exists, and results are kept as measured: give another --name or --out")
    facts: dict[str, Any] = {
        "environment": environment(),
        "shape": {"name": options.shape, **SHAPES[options.shape]},
        "requests": options.requests,
        "prompt_len": PROMPT_LEN,
    }
    with tempfile.TemporaryDirectory(prefix="onegraph-bench-") as folder:
        facts["modes"] = measure(options.shape, options.requests, options.steps, options.rounds, Path(folder))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(facts, indent=1) + "\n")
    print(table(facts["modes"]))
    print(f"written: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
