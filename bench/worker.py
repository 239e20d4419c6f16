"""One engine does one workload in a process of its own and prints one line of JSON.

usage: python -m bench.worker ENGINE MODEL WORKLOAD_JSON STARTED, where STARTED is the time.time() at which the
harness started the process.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

from bench.workloads import Workload

Generate = Callable[[list[list[int]], int], int]
"""Greedily generates the given number of tokens for each prompt, and gives how many there are in all."""


def start_onegraph(model: str, enforce_eager: bool) -> Generate:
    from onegraph import LLM, SamplingParams

    llm = LLM(model, enforce_eager=enforce_eager, enable_prefix_caching=False, max_model_len=1024)

    def generate(prompts: list[list[int]], num_tokens: int) -> int:
        params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    return generate


def start_transformers(model: str, compiled: bool) -> Generate:
    import torch
    from transformers import AutoModelForCausalLM, CompileConfig

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval()
    more: dict[str, Any] = {}
    if compiled:
        compile_config = CompileConfig(fullgraph=True, mode="default")
        compile_config._compile_all_devices = True  # else generate compiles on accelerators only
        more = {"cache_implementation": "static", "compile_config": compile_config}

    def generate(prompts: list[list[int]], num_tokens: int) -> int:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            out = loaded.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=num_tokens,
                max_new_tokens=num_tokens,
                pad_token_id=0,
                **more,
            )
        return int((out.shape[1] - ids.shape[1]) * ids.shape[0])

    return generate


ENGINES: dict[str, Callable[[str], Generate]] = {
    "onegraph": lambda model: start_onegraph(model, enforce_eager=False),
    "onegraph-eager": lambda model: start_onegraph(model, enforce_eager=True),
    "transformers": lambda model: start_transformers(model, compiled=False),
    "transformers-compile": lambda model: start_transformers(model, compiled=True),
}


def graphs_compiled() -> int:
    """How many graphs this process has compiled so far, by torch.compile or by onegraph.

    Reads modules that are loaded already and imports none, so that eager engines don't pay for it.
    """
    dynamo = sys.modules.get("torch._dynamo.utils")
    ours = sys.modules.get("onegraph.counters")
    compiled = int(dynamo.counters["stats"]["unique_graphs"]) if dynamo else 0
    return compiled + (int(ours.counters.snapshot().get("inductor_compiles", 0)) if ours else 0)


def conditions(config: dict[str, Any]) -> dict[str, Any]:
    """What has to be equal for all engines: torch's threads in this process, and the model's dtype."""
    import torch

    return {"threads": torch.get_num_threads(), "dtype": config.get("dtype") or config.get("torch_dtype")}


def main(engine: str, model: str, workload: Workload, started: float) -> dict[str, Any]:
    """Does the work; gives seconds, tokens, and for generation the graphs compiled while the clock ran.

    The unmeasured round is the same work, not a smaller one: a static cache has one shape for each batch size and
    length, and its decode step is compiled anew for each, which took nearly all of the measured time before.
    """
    with open(f"{model}/config.json") as file:
        config = json.load(file)
    prompts = workload.prompts(config["vocab_size"])
    generate = ENGINES[engine](model)
    if workload.measure == "first_token":
        tokens = generate(prompts, workload.output_len)
        return {"seconds": time.time() - started, "tokens": tokens, **conditions(config)}
    generate(prompts, workload.output_len)
    before = graphs_compiled()
    began = time.perf_counter()
    tokens = generate(prompts, workload.output_len)
    seconds = time.perf_counter() - began
    return {
        "seconds": seconds,
        "tokens": tokens,
        "compiled_while_timed": graphs_compiled() - before,
        **conditions(config),
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], Workload(**json.loads(sys.argv[3])), float(sys.argv[4]))))
