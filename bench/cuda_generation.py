"""One engine generates on a GPU in a process of its own, and adds a line of JSON to a file for each number of requests.

usage: python -m bench.cuda_generation ENGINE FOLDER DEVICE REQUESTS PROMPT_LEN OUTPUT_LEN FILE

The first round of a number of requests isn't measured: engines that compile for a size, or record one, do it there.
`prepare` isn't an engine: it writes the folder's model, of the shape that REQUESTS names, with weights that are made
on the device. Greedy, and exactly OUTPUT_LEN tokens for each request.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bench.worker import Engine, start_transformers, start_transformers_batching

ENGINES = ("onegraph", "transformers-compile", "transformers-batching")


def start_onegraph(folder: str, device: str, counts: list[int], max_len: int) -> tuple[Engine, Any]:
    """`LLM` with batches of one new token for each request recorded at the numbers of requests; and the LLM."""
    from onegraph import LLM, SamplingParams

    llm = LLM(
        folder,
        device=device,
        compilation_config={"cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": counts},
        enable_prefix_caching=False,
        max_model_len=max_len,
        max_num_seqs=max(counts),
        num_kv_blocks=max(counts) * -(-max_len // 16) + 1,
    )

    def generate(prompts: list[list[int]], num_tokens: int) -> int:
        params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    return Engine(generate), llm


def generation(
    engine: Engine, counts: Iterable[int], prompt: Callable[[], list[int]], num_tokens: int
) -> Iterable[dict[str, Any]]:
    """Tokens and seconds of a round at each number of requests."""
    for count in counts:
        engine.generate([prompt() for _ in range(count)], num_tokens)
        began = time.perf_counter()
        tokens = engine.generate([prompt() for _ in range(count)], num_tokens)
        seconds = time.perf_counter() - began
        yield {"requests": count, "tokens": tokens, "seconds": round(seconds, 4), "tokens_per_s": tokens / seconds}


def step_overhead(
    llm: Any, count: int, prompt: Callable[[], list[int]], num_tokens: int, wait: Callable[[], None]
) -> dict[str, Any]:
    """Median milliseconds of a step in which all requests decode: all of it, the model with its work on the device, and
    the rest."""
    from bench.figures import summary
    from bench.step_overhead import Clock, decode_steps, wrap_engine

    runner, forward = llm.engine._runner, llm.engine._runner._forward

    def waited(*args: Any, **kwargs: Any) -> Any:
        result = forward(*args, **kwargs)
        wait()
        return result

    clock, runner._forward = Clock(), waited
    wrap_engine(llm.engine, clock)
    steps = decode_steps(llm.engine, clock, [prompt() for _ in range(count)], num_tokens, stream=False)
    step, model = (
        summary([sum(one[part] for part in parts) for one in steps])["median"]
        for parts in (("step",), ("model_without_replay", "replay"))
    )
    return {"requests": count, "step_ms": step, "model_ms": model, "outside_model_ms": round(step - model, 4)}


def main(words: list[str]) -> int:
    engine, folder, device, requests, prompt_len, output_len, file = words
    if engine == "prepare":
        return prepare(requests, Path(folder), device)
    import torch

    counts, num_prompt, num_tokens = json.loads(requests), int(prompt_len), int(output_len)
    vocab_size = json.loads((Path(folder) / "config.json").read_text())["vocab_size"]
    rng = random.Random(0)

    def prompt() -> list[int]:
        return [rng.randrange(1, vocab_size) for _ in range(num_prompt)]

    def tell(facts: dict[str, Any]) -> None:
        with open(file, "a") as out:
            out.write(json.dumps(facts) + "\n")

    llm = None
    if engine == "onegraph":
        running, llm = start_onegraph(folder, device, counts, num_prompt + num_tokens + 16)
    elif engine == "transformers-compile":
        running = start_transformers(folder, compiled=True, device=device)
    else:
        running = start_transformers_batching(folder, device, 0.15 if device == "cpu" else 0.6)
    try:
        for facts in generation(running, counts, prompt, num_tokens):
            tell(facts)
        if llm is not None:
            wait = torch.cuda.synchronize if device == "cuda" else lambda: None
            tell({"overhead": step_overhead(llm, max(counts), prompt, num_tokens, wait)})
    finally:
        running.close()
    return 0


def prepare(shape: str, folder: Path, device: str) -> int:
    """Writes a model of the shape, with weights from the device's generator."""
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    from bench.models import make_config, make_tokenizer

    torch.manual_seed(0)
    config = make_config(shape)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=make_tokenizer(config.vocab_size)).save_pretrained(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
