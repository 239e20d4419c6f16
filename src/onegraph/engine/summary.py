"""The start-up summary: a few lines on what runs and how it came about.

Takes: a `Started` engine. Gives: text for people; `explain` has the same as data.
"""

from onegraph.api import open_store
from onegraph.engine.startup import Started
from onegraph.env import environment
from onegraph.ir.recording import recorded_lines
from onegraph.op_kernels import OpKernels
from onegraph.targets import describe_target


def summarise(started: Started) -> str:
    """The lines, without a newline at the end."""
    model, limits, config = started.model, started.limits, started.config
    explanation = started.explain()
    settings = {name: item["value"] for name, item in explanation.config.items()}
    start = explanation.start
    is_indexed = explanation.index is not None and explanation.index.status == "hit"
    made = "assemble" if start == "eager" else "load" if is_indexed else "capture and compile or load"
    total_s = started.load_s + started.compile_s
    lines = [
        f"model     {model.name}: {_count(model.num_parameters)} parameters, {_dtype(model.kv.dtype)}, "
        f"{_size(model.weight_bytes)} of weights",
        f"device    {describe_target(started.target)}",
        f"KV cache  {limits.kv_cache}",
        f"limits    {limits.max_model_len} tokens a text, {limits.max_num_seqs} sequences and "
        f"{limits.max_num_batched_tokens} tokens a step",
        f"start     {start}, {total_s:.1f} s (weights {started.load_s:.1f} s, {made} {started.compile_s:.1f} s)",
        f"cache     {_cache()}",
        f"attention {_attention(started.op_kernels)}",
    ]
    on = {
        f"compile (mode {settings.get('mode')}, backend {settings.get('backend')})": start != "eager",
        f"cudagraphs ({settings.get('cudagraph_mode')})": settings.get("cudagraph_mode") != "NONE",
        "prefix caching": config.enable_prefix_caching,
    }
    lines.append(f"on        {', '.join(name for name, is_on in on.items() if is_on) or 'nothing'}")
    lines.append(f"off       {', '.join(name.split(' (')[0] for name, is_on in on.items() if not is_on) or 'nothing'}")
    plan = explanation.recording_plan
    if plan is not None and plan.lazily_at is not None:
        lines.append(f"records   {plan.lines()[0]}")
    lines += [f"recorded  {line}" for line in recorded_lines(explanation.recorded)]
    lines += [f"note      {note}" for note in (*limits.downgrades, *explanation.notes)]
    return "\n".join(lines)


def _attention(found: OpKernels) -> str:
    return f"{found.kind}, {found.why} ({found.seconds:.1f} s)" if found.is_installed else "plain PyTorch"


def _cache() -> str:
    if environment().disable_compile_cache:
        return "off (ONEGRAPH_DISABLE_COMPILE_CACHE)"
    store = open_store()
    if store is None:
        return f"off ({environment().cache_root} can't be written)"
    base = "" if store.base is None else f", over {store.base}, which is only read"
    if not store.keeps:
        return f"{store.root} can't be written{base}"
    return f"{store.root}, {_size(store.size_bytes())}{base}"


def _dtype(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _count(number: int) -> str:
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.1f} {unit}".replace(" ", "")
    return str(number)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"
