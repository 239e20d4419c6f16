"""Compiles a model for a process to come: no weights are read, nothing that is compiled is loaded or run.

Takes: an `EngineConfig`, the CPU and the number of threads to compile for. Gives: a `CompiledAhead`, whose model is
there to be saved. The process that loads the file does what needs values or a machine: see `pending`.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from onegraph import api
from onegraph.compiled import CompiledModel
from onegraph.config.engine import EngineConfig
from onegraph.engine.limits import Limits, resolve_limits
from onegraph.engine.progress import bar
from onegraph.engine.startup import compiled_engine, layers_of
from onegraph.errors import ConfigError
from onegraph.explanation import Explanation
from onegraph.garbage import collected_later
from onegraph.models import BUILTIN_MODEL, LoadedModel, load_model
from onegraph.op_kernels import install_op_kernels, op_kernels_begun
from onegraph.targets import describe_target, host_zeros, resolve_device, target_to_compile_for

MAX_THREADS = 4096
"""The memory of loops with partial sums grows with their number."""


@dataclass(frozen=True, slots=True)
class CompiledAhead:
    """A model that was compiled, and can't be called. `machine` is the fingerprint that it was compiled for."""

    model: LoadedModel
    compiled: CompiledModel
    limits: Limits
    explanation: Explanation
    machine: dict[str, Any]
    seconds: float


@collected_later()
def compile_ahead(config: EngineConfig, *, march: str | None = None, threads: int | None = None) -> CompiledAhead:
    """Compiles (or takes what was compiled before); shows bars where stderr is a terminal.

    `march` names a CPU's instructions (None: this one's), `threads` how many run a step (None: this process's).

    Errors: ConfigError, ModelError, and what compiling raises.
    """
    began = time.perf_counter()
    device = resolve_device(config.device)
    target = target_to_compile_for(device, march)
    with _so_many(threads):
        with bar("model", 3) as progress:
            model = load_model(
                config.model or BUILTIN_MODEL,
                dtype=config.dtype,
                device=device,
                trust_remote_code=config.trust_remote_code,
                progress=progress,
                zeros=host_zeros,
            )
        layers = layers_of(model)
        # What was asked for need only fit where it will run; a default goes by the memory that is here.
        available = target.available_bytes if config.num_kv_blocks is None else lambda: None
        limits = resolve_limits(config, model_len=model.max_model_len, layers=layers, available_bytes=available)
        store = api.open_store()
        with bar("compile", 6) as progress, op_kernels_begun(target, store):
            compiled, _ = compiled_engine(config, model, layers, limits, target, progress)
            progress("attention kernel")
            install_op_kernels(target, store)
        explanation = replace(compiled.explain(), device=describe_target(target))
        machine = {"name": target.name, **target.fingerprint()}
    return CompiledAhead(model, compiled, limits, explanation, machine, time.perf_counter() - began)


@contextmanager
def _so_many(threads: int | None) -> Iterator[None]:
    """Inside, torch has so many threads, for which Inductor writes its loops."""
    if threads is None:
        yield
        return
    if not 1 <= threads <= MAX_THREADS:
        hint = f"it takes a whole number from 1 to {MAX_THREADS}"
        raise ConfigError(f"threads={threads}", where="--threads", hint=hint)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
