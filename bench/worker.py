"""One engine does workloads in a process of its own and prints one line: RESULT and a JSON list, a run for each.

usage: python -m bench.worker ENGINE MODEL WORKLOADS_JSON STARTED, where STARTED is the time.time() at which the
harness started the process. Runs in the engine's own interpreter: imports the standard library alone, and then the
one engine that was asked for.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench.workloads import Workload

RESULT = "RESULT "
"""Begins the line with the result: engines log to the same stream, also after it."""

Generate = Callable[[list[list[int]], int], int]
"""Greedily generates the given number of tokens for each prompt, and gives how many there are in all."""


def graphs_compiled() -> int:
    """How many graphs this process has compiled so far, by torch.compile or by onegraph.

    Reads modules that are loaded already and imports none, so that eager engines don't pay for it.
    """
    dynamo = sys.modules.get("torch._dynamo.utils")
    ours = sys.modules.get("onegraph.counters")
    compiled = int(dynamo.counters["stats"]["unique_graphs"]) if dynamo else 0
    return compiled + (int(ours.counters.snapshot().get("inductor_compiles", 0)) if ours else 0)


def state_here() -> dict[str, int]:
    """Torch's threads in this process, the graphs that it has compiled so far, and the most memory that it has had."""
    import resource

    import torch

    most_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"threads": torch.get_num_threads(), "graphs": graphs_compiled(), "peak_rss_mib": most_kib // 1024}


@dataclass(frozen=True)
class Engine:
    """A ready engine; `state` is of the process that runs the model, which may be a child; `close` ends threads."""

    generate: Generate
    state: Callable[[], dict[str, int]] = state_here
    close: Callable[[], None] = lambda: None


def start_onegraph(model: str, enforce_eager: bool = False, **fields: str) -> Engine:
    from onegraph import LLM, SamplingParams

    llm = LLM(
        model,
        enforce_eager=enforce_eager,
        compilation_config=fields,
        enable_prefix_caching=False,
        max_model_len=1024,
    )

    def generate(prompts: list[list[int]], num_tokens: int) -> int:
        params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    return Engine(generate)


def start_vllm(model: str, enforce_eager: bool) -> Engine:
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # lets `state` ask the process that runs the model
    from vllm import LLM, SamplingParams

    llm = LLM(model=model, enforce_eager=enforce_eager, enable_prefix_caching=False, max_model_len=1024)

    def generate(prompts: list[list[int]], num_tokens: int) -> int:
        params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    def state() -> dict[str, int]:
        return dict(llm.collective_rpc(lambda worker: state_here())[0])

    return Engine(generate, state)


def start_transformers(model: str, compiled: bool, device: str = "cpu") -> Engine:
    import torch
    from transformers import AutoModelForCausalLM, CompileConfig

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval().to(device)
    more: dict[str, Any] = {}
    if compiled:
        compile_config = CompileConfig(fullgraph=True, mode="default" if device == "cpu" else "reduce-overhead")
        compile_config._compile_all_devices = True  # else generate compiles on accelerators only
        more = {"cache_implementation": "static", "compile_config": compile_config}

    def generate(prompts: list[list[int]], num_tokens: int) -> int:
        ids = torch.tensor(prompts, device=device)
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

    return Engine(generate)


def start_torch_compile(model: str) -> Engine:
    """Stock `torch.compile` of a transformers model's forward, dynamic in its sizes, with torch's own caches."""
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval()
    forward = torch.compile(loaded.forward, dynamic=True)

    def generate(prompts: list[list[int]], num_tokens: int) -> int:
        if num_tokens != 1:
            raise ValueError("torch-compile is measured at starts alone: it gives one token")
        with torch.inference_mode():
            logits = forward(input_ids=torch.tensor(prompts), use_cache=False, logits_to_keep=1).logits
        return int(logits[:, -1].argmax(-1).numel())

    return Engine(generate)


def start_transformers_batching(model: str, device: str = "cpu", memory: float = 0.15) -> Engine:
    """transformers' continuous batching, through the manager that its `generate_batch` makes anew for each call.

    Its KV cache takes nine tenths of the free memory unless told otherwise, and touches all of it: here `memory`.
    """
    from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval().to(device)
    manager = loaded.init_continuous_batching(
        generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(max_memory_percent=memory, allow_block_sharing=False),
    )
    manager.warmup()
    manager.start()

    def generate(prompts: list[list[int]], num_tokens: int) -> int:
        manager.add_requests(inputs=prompts, max_new_tokens=num_tokens)
        lengths: list[int] = []
        while len(lengths) < len(prompts):
            result = manager.get_result(timeout=1)
            if result is None and not manager.is_running():
                raise RuntimeError("the generation thread has ended")
            if result is not None and result.error is not None:
                raise RuntimeError(f"a request failed: {result.error}")
            if result is not None and result.is_finished():
                lengths.append(len(result.generated_tokens))
        return sum(lengths)

    return Engine(generate, close=manager.stop)


ENGINES: dict[str, Callable[[str], Engine]] = {
    "onegraph": start_onegraph,
    "onegraph-unrecorded": lambda model: start_onegraph(model, cudagraph_mode="NONE"),
    "onegraph-eager": lambda model: start_onegraph(model, enforce_eager=True),
    "vllm": lambda model: start_vllm(model, enforce_eager=False),
    "vllm-eager": lambda model: start_vllm(model, enforce_eager=True),
    "transformers": lambda model: start_transformers(model, compiled=False),
    "transformers-compile": lambda model: start_transformers(model, compiled=True),
    "torch-compile": start_torch_compile,
    "transformers-batching": start_transformers_batching,
}


def main(engine: str, model: str, workloads: list[Workload], started: float) -> list[dict[str, Any]]:
    """Does the work; gives each workload's seconds, tokens, and for generation the graphs compiled meanwhile.

    The unmeasured round is the same work, not a smaller one: a static cache has one shape for each batch size and
    length, and its decode step is compiled anew for each, which took nearly all of the measured time before.
    """
    with open(f"{model}/config.json") as file:
        config = json.load(file)
    dtype = config.get("dtype") or config.get("torch_dtype")
    running = ENGINES[engine](model)
    try:
        return [
            {**timed(running, one, one.prompts(config["vocab_size"]), started), "dtype": dtype} for one in workloads
        ]
    finally:
        running.close()


def timed(running: Engine, workload: Workload, prompts: list[list[int]], started: float) -> dict[str, Any]:
    """Seconds, tokens and what the process says of itself."""
    if workload.measure == "first_token":
        tokens = running.generate(prompts, workload.output_len)
        seconds = time.time() - started
        return {"seconds": seconds, "tokens": tokens, "threads": running.state()["threads"]}
    running.generate(prompts, workload.output_len)
    before = running.state()
    began = time.perf_counter()
    tokens = running.generate(prompts, workload.output_len)
    seconds = time.perf_counter() - began
    after = running.state()
    return {
        "seconds": seconds,
        "tokens": tokens,
        "compiled_while_timed": after["graphs"] - before["graphs"],
        "threads": before["threads"],
        "peak_rss_mib": after["peak_rss_mib"],
    }


if __name__ == "__main__":
    asked = [Workload(**fields) for fields in json.loads(sys.argv[3])]
    found = main(sys.argv[1], sys.argv[2], asked, float(sys.argv[4]))
    print(f"{RESULT}{json.dumps(found)}", flush=True)
