"""Traces in torch's form with every entry that onegraph writes, of a decoder with many layers and hostile names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HOSTILE = "<script>document.title = 'owned'</script><img src=https://example.com/x.png onerror=alert(1)>\"'&"
MODEL_FILE = "/home/someone/with/a/rather/long/path/to/models/modeling_decoder.py"


def line(kind: str, value: Any, payload: str | None = None, *, pid: int = 4242, frame: int | None = None) -> str:
    """One entry as torch's handler writes it; `frame` is the number of its compile."""
    header: dict[str, Any] = {kind: value}
    if frame is not None:
        header |= {"frame_id": frame, "frame_compile_id": 0, "attempt": 0}
    if payload is not None:
        header["has_payload"] = hashlib.md5(payload.encode(), usedforsecurity=False).hexdigest()
    text = f"V1201 10:15:00.123456 {pid} torch/_logging/structured.py:42] {json.dumps(header)}\n"
    return text + ("" if payload is None else "".join(f"\t{one}\n" for one in payload.split("\n")))


def entry(name: str, value: Any, *, pid: int = 4242, frame: int | None = None) -> str:
    """An entry of onegraph's: a text, or facts as JSON."""
    payload = value if isinstance(value, str) else json.dumps(value, indent=1)
    encoding = "string" if isinstance(value, str) else "json"
    return line("artifact", {"name": f"onegraph_{name}", "encoding": encoding}, payload, pid=pid, frame=frame)


def write_trace(folder: Path, entries: Mapping[str, Any], *, pid: int = 4242) -> Path:
    """A trace of one process, with some entries of torch's own between."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"dedicated_log_torch_trace_{pid}.log"
    lines = [line("str", [MODEL_FILE, 0], pid=pid), line("dynamo_start", {"stack": []}, pid=pid)]
    lines += [entry(name, value, pid=pid) for name, value in entries.items()]
    lines.append(line("compilation_metrics", {"co_name": "forward", "fail_type": None}, pid=pid))
    path.write_text("".join(lines))
    return path


def entries(*, layers: int = 60, warm: bool = False) -> dict[str, Any]:
    """One start's entries: cold, with three pieces that are compiled, or warm from the index."""
    groups = {0: 0, **dict.fromkeys(range(2, 2 * layers, 2), 2), 2 * layers: 2 * layers}
    distinct = sorted(set(groups.values()))
    keys = {index: hashlib.sha256(str(index).encode()).hexdigest() for index in distinct}
    store = "hit" if warm else "miss"
    why = "compiled on 2026-11-30" if warm else "no artifact has this key"
    ranges = {
        index: [
            {"min": 1, "max": 8192, "predicate": None, "key": keys[index], "store": store, "why": why, "seconds": 1.2}
        ]
        for index in distinct
    }
    pieces = [_piece(index, groups, ranges, layers) for index in range(2 * layers + 1)]
    sizes = [_recorded(number) for number in (1, 2, 4, 8, 16)]
    uncovered = [{"range": [17, 8192], "why": "no recording of this size"}]
    planned = {
        "sizes": {"FULL_DECODE_ONLY": [1, 2, 4, 8, 16]},
        "chosen": "by default",
        "lazily_at": 8,
        "uncovered": uncovered,
    }
    config = {
        "mode": {"value": "ONEGRAPH", "why": "-O2"},
        "cudagraph_mode": {"value": "FULL_DECODE_ONLY", "why": "device rule"},
        "inductor_compile_config": {"value": {"cpp.threads": 2, HOSTILE: HOSTILE}, "why": "user"},
        **{f"setting_{number}": {"value": number, "why": "default"} for number in range(30)},
    }
    ledger = {
        "inputs": [{"path": f"kv_caches[{n}]", "fact": "dtype", "value": "torch.bfloat16"} for n in range(layers)],
        "shape": [
            {
                "expr": "num_tokens <= 8192",
                "user": None,
                "framework": "torch/_meta.py:12",
                "stage": "capture",
                "effect": "proven",
            },
            {
                "expr": f"Ne(num_tokens, 0) {HOSTILE}",
                "user": f"{MODEL_FILE}:41",
                "framework": None,
                "stage": "piece 2",
                "effect": "proven",
            },
        ],
        "state": [
            {
                "what": f"self.layers.{n}.self_attn.scaling",
                "value": HOSTILE if n == 1 else "0.125",
                "checked": "event",
                "user": f"{MODEL_FILE}:{n}",
            }
            for n in range(layers * 6)
        ],
        "not_seen": "a change of the module while requests are running",
    }
    explain = {
        "model": "LlamaForCausalLM 1B",
        "device": "CPU, AVX2, 2 threads",
        "config": config,
        "stages": [{"name": "capture", "seconds": 5.4}, {"name": "compile or load", "seconds": 7.9}],
        "dims": [{"name": "num_tokens", "min": 1, "max": 8192, "inputs": ["input_ids", "positions", "slot_mapping"]}],
        "graph": {"ops": 1834},
        "ledger": ledger,
        "index": {"status": store, "why": why},
        "pieces": pieces,
        "passes": [
            {
                "name": "merge_linears",
                "rewrites": 3 * layers,
                "pieces": layers,
                "seconds": 0.2,
                "skipped": None,
                "near_misses": [],
            },
            {
                "name": "fuse_rotary",
                "rewrites": 2 * layers,
                "pieces": layers,
                "seconds": 0.1,
                "skipped": None,
                "near_misses": [
                    {"why": f"the table is not shared {HOSTILE}", "where": f"{MODEL_FILE}:88", "pieces": 2}
                ],
            },
        ],
        "plan": {"mode": "FULL_DECODE_ONLY", "planned": planned, "sizes": sizes, "uncovered": uncovered, "padded": []},
    }
    found: dict[str, Any] = {
        "process": {
            "pid": 4242,
            "command": ["onegraph", "serve", "/models/llama-1b", "--port", "8000", HOSTILE],
            "versions": {"onegraph": "0.1.0", "torch": "2.13.0", "python": "3.11.7", "transformers": "5.23.0"},
            "machine": "AMD EPYC, 2 cores, 23 GiB",
            "started_at": 1796120100.25,
        },
        "config": config,
        "captured_graph": _graph("Captured", 400),
        "ledger": ledger,
        "split_graph": _graph("Split", 2 * layers + 1),
        "store": {
            "root": "/home/someone/.cache/onegraph",
            "index": explain["index"],
            "pieces": [
                {
                    "index": index,
                    "range": [1, 8192],
                    "key": keys[index],
                    "store": store,
                    "why": why,
                    "nearest": None if warm else "5f3a",
                    "differs": [] if warm else [{"field": "torch", "was": "2.12.0", "is": "2.13.0"}],
                    "folder": f"/home/someone/.cache/onegraph/unpacked/piece_{index}-{keys[index][:16]}"
                    if index == 2
                    else None,
                }
                for index in distinct
            ],
        },
        "execution_plan": "def run(args):\n"
        + "".join(f"    v{n} = __pieces[{n}](v{n - 1})\n" for n in range(1, 2 * layers)),
        "recording_plan": planned,
        "recordings": sizes,
        "timeline": _timeline(distinct, warm),
        "profile": _profile(layers, groups),
        "explain": explain,
    }
    for index in distinct:
        graph = _graph(f"Piece{index}", 60)
        found[f"piece_{index}_before_passes"] = graph
        found[f"piece_{index}_after_merge_linears"] = graph.replace("linear_7", f"merged_7 {HOSTILE}")
        found[f"piece_{index}_after_fuse_rotary"] = graph.replace("linear_7", f"merged_7 {HOSTILE}")
        found[f"piece_{index}_output_code"] = f"# {HOSTILE}\nkernel_0 = kernels['kernel_0']\n" + "\n".join(
            f"buf{n} = 1" for n in range(80)
        )
    found["piece_2_range_16_16_output_code"] = "kernel_1 = kernels['kernel_1']\n"
    if warm:
        checks = [{"what": f"self.layers.{n}.scale", "recorded": "1.0", "now": "1.0", "holds": True} for n in range(5)]
        found["ledger_evaluation"] = {"held": 1200, "checks": checks, "verdict": "all facts hold"}
    return found


def _piece(index: int, groups: Mapping[int, int], ranges: Mapping[int, Any], layers: int) -> dict[str, Any]:
    compiled = index in groups
    head = groups.get(index, index)
    return {
        "index": index,
        "kind": "compiled" if compiled else "splitting_op",
        "same_as": None if head == index else head,
        "differs_from": None,
        "module_path": f"model.layers.{min(index // 2, layers - 1)}",
        "why": "" if compiled else f"onegraph::paged_attention at {MODEL_FILE}:120",
        "ops": 30 if compiled else 2,
        "backend": "inductor" if compiled else "eager",
        "ranges": ranges[head] if compiled else [],
        "passes": {"merge_linears": 3} if compiled else {},
    }


def _recorded(num_tokens: int) -> dict[str, Any]:
    return {
        "num_tokens": num_tokens,
        "mode": "FULL_DECODE_ONLY",
        "steps": 700,
        "bytes": 300_000 * num_tokens,
        "seconds": 0.08,
        "unrecorded": [],
    }


def _graph(name: str, num_lines: int) -> str:
    body = "".join(
        f"        # File: {MODEL_FILE}:{n} in forward, code: x = self.linear(x)\n"
        f'        linear_{n}: "bf16[s0, 576]" = torch.ops.aten.linear.default(x_{n}, w_{n});  x_{n} = None\n'
        for n in range(num_lines // 2)
    )
    return f"class {name}(torch.nn.Module):\n    def forward(self, x_0):\n{body}        return linear_0"


def _timeline(distinct: list[int], warm: bool) -> dict[str, Any]:
    factor = 0.1 if warm else 1.0
    events, at = [], 0.0
    compiled = 7.9 * factor
    for name, seconds in (
        *(("import", 1.9), ("weights", 1.1), ("index", 0.05), ("capture", 5.4 * factor), ("split", 0.2 * factor)),
        *(("passes", 0.4 * factor), ("compile or load", compiled), ("plan", 0.05), ("bind", 0.02), ("kernels", 0.1)),
        *(("record", 0.3), ("first token", 0.04)),
    ):
        events.append({"name": name, "start_s": at, "seconds": seconds, "detail": ""})
        if name == "compile or load":
            for number, index in enumerate(distinct):
                part = compiled / len(distinct)
                events.append(
                    {"name": f"piece {index}", "start_s": at + number * part, "seconds": part, "detail": "lower"}
                )
        at += seconds
    return {"events": events, "ready_s": at - 0.34, "first_token_s": at}


def _profile(layers: int, groups: Mapping[int, int]) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []

    def add(path: list[str], seconds: float, **more: Any) -> None:
        rows.append(
            {
                "path": path,
                "calls_per_step": 1.0,
                "seconds_per_step": seconds,
                "ops": [],
                "user": None,
                "module_path": None,
                **more,
            }
        )

    piece_s, attention_s = 0.0004, 0.00015
    model_s = len(groups) * piece_s + layers * attention_s
    add(["step"], model_s + 0.0016)
    add(["step", "schedule"], 0.0003)
    add(["step", "prepare inputs"], 0.0006)
    add(["step", "model"], model_s)
    for index in range(2 * layers + 1):
        layer = f"model.layers.{min(index // 2, layers - 1)}"
        if index in groups:
            path = ["step", "model", f"piece {index} ({layer})"]
            add(path, piece_s, module_path=layer)
            more = {"module_path": layer, "user": f"{MODEL_FILE}:77", "ops": ["linear_1", "mul_3", "add_9"]}
            add([*path, "kernel_fused_linear_mul_0"], piece_s * 0.7, **more)
            add([*path, f"kernel_{HOSTILE}"], piece_s * 0.25, **more)
        else:
            add(["step", "model", f"piece {index} (paged_attention)"], attention_s, module_path=layer)
    add(["step", "sample"], 0.0004)
    add(["step", "detokenise"], 0.0003)
    return {
        "steps": 64,
        "batches": [
            {"num_tokens": 8, "num_seqs": 8, "kind": "decode", "count": 60},
            {"num_tokens": 512, "num_seqs": 4, "kind": "prefill", "count": 4},
        ],
        "seconds_per_step": model_s + 0.0016,
        "rows": rows,
    }
