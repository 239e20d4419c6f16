"""The public names are frozen, lazy, and need nothing but torch and transformers."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys

import pytest

import onegraph

PUBLIC = [
    "CUDAGraphMode",
    "CompilationConfig",
    "CompilationMode",
    "LLM",
    "SamplingParams",
    "__version__",
    "compile",
    "eager_break",
    "errors",
    "load",
    "opaque",
    "support_torch_compile",
]


def python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_public_names() -> None:
    assert sorted(onegraph.__all__) == PUBLIC
    assert all(getattr(onegraph, name) is not None for name in PUBLIC)
    assert sorted(dir(onegraph)) == PUBLIC


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'compil'"):
        onegraph.compil  # noqa: B018


def test_the_config_s_module_is_public_too() -> None:
    from onegraph.config.compilation import CompilationConfig, CompilationMode, CUDAGraphMode

    assert onegraph.CompilationConfig is CompilationConfig
    assert onegraph.CompilationMode is CompilationMode
    assert onegraph.CUDAGraphMode is CUDAGraphMode


def test_arguments_of_compile() -> None:
    parameters = inspect.signature(onegraph.compile).parameters
    assert next(iter(parameters)) == "module"
    assert {"dynamic_shapes", "config", "name"} <= set(parameters)


def test_arguments_of_llm_and_their_defaults() -> None:
    parameters = inspect.signature(onegraph.LLM).parameters
    assert {name: parameter.default for name, parameter in parameters.items()} == {
        "model": None,
        "dtype": "auto",
        "device": "auto",
        "enforce_eager": False,
        "compilation_config": None,
        "max_model_len": None,
        "max_num_seqs": 256,
        "max_num_batched_tokens": None,
        "num_kv_blocks": None,
        "block_size": 16,
        "enable_prefix_caching": True,
        "tensor_parallel_size": 1,
        "seed": 0,
        "trust_remote_code": False,
        "artifact": None,
    }


def test_fields_of_sampling_params() -> None:
    assert set(inspect.signature(onegraph.SamplingParams).parameters) == {
        *("n", "temperature", "top_p", "top_k", "min_p", "seed", "max_tokens", "min_tokens", "stop"),
        *("stop_token_ids", "ignore_eos", "logprobs", "prompt_logprobs", "presence_penalty"),
        *("frequency_penalty", "repetition_penalty", "logit_bias"),
    }


def test_errors_are_all_under_one() -> None:
    for name in (
        "ConfigError",
        "CaptureError",
        "ConstraintError",
        "CompileError",
        "ArtifactError",
        "RecordingError",
        "ShapeOutOfRangeError",
    ):
        assert issubclass(getattr(onegraph.errors, name), onegraph.errors.OnegraphError)


def test_import_loads_nothing_heavy() -> None:
    names = "sorted({name.split('.')[0] for name in sys.modules})"
    loaded = json.loads(python(f"import sys, json, onegraph, onegraph.cli.main; print(json.dumps({names}))"))
    assert "onegraph" in loaded
    assert not {"torch", "transformers", "numpy", "tqdm"} & set(loaded)


def test_the_core_needs_only_torch_and_transformers() -> None:
    """Every module of the core is imported where the extras can't be."""
    python("""
import importlib, importlib.machinery, pkgutil
extras = {"fastapi", "uvicorn", "pydantic", "prometheus_client", "tlparse", "psutil", "pytest", "hypothesis"}
find = importlib.machinery.PathFinder.find_spec
def find_no_extras(name, path=None, target=None):
    return None if name.split(".")[0] in extras else find(name, path, target)
importlib.machinery.PathFinder.find_spec = find_no_extras
assert not any(map(importlib.util.find_spec, extras))
import onegraph
modules = [module.name for module in pkgutil.walk_packages(onegraph.__path__, "onegraph.")]
modules = [name for name in modules if not name.startswith("onegraph.serve.") or name == "onegraph.serve.settings"]
modules.remove("onegraph.targets.cuda.kernels")  # needs Triton, which comes with torch for CUDA
assert len(modules) > 50, modules
for name in modules:
    importlib.import_module(name)
""")


def test_torch_compile_knows_the_backend() -> None:
    from torch._dynamo.backends.registry import lookup_backend

    from onegraph.api import torch_compile_backend

    assert lookup_backend("onegraph") is torch_compile_backend
