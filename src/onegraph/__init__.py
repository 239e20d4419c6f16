"""onegraph: a torch.compile stack for LLM inference. One graph, one artifact, every batch size.

The public names are loaded when they are first used, so that `import onegraph` costs nothing and works on any
platform; using one where onegraph can't run says so in one line.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from onegraph.garbage import collected_later
from onegraph.timeline import timeline
from onegraph.version import __version__

if TYPE_CHECKING:
    from onegraph import errors as errors
    from onegraph.api import compile as compile
    from onegraph.api import load as load
    from onegraph.api import support_torch_compile as support_torch_compile
    from onegraph.config.compilation import CompilationConfig as CompilationConfig
    from onegraph.config.compilation import CompilationMode as CompilationMode
    from onegraph.config.compilation import CUDAGraphMode as CUDAGraphMode
    from onegraph.eager_breaks import eager_break as eager_break
    from onegraph.llm import LLM as LLM
    from onegraph.llm import SamplingParams as SamplingParams
    from onegraph.opaque_ops import opaque as opaque

__all__ = [
    "LLM",
    "CUDAGraphMode",
    "CompilationConfig",
    "CompilationMode",
    "SamplingParams",
    "__version__",
    "compile",
    "eager_break",
    "errors",
    "load",
    "opaque",
    "support_torch_compile",
]

_MODULES = {
    "LLM": "onegraph.llm",
    "CUDAGraphMode": "onegraph.config.compilation",
    "CompilationConfig": "onegraph.config.compilation",
    "CompilationMode": "onegraph.config.compilation",
    "SamplingParams": "onegraph.llm",
    "compile": "onegraph.api",
    "eager_break": "onegraph.eager_breaks",
    "load": "onegraph.api",
    "opaque": "onegraph.opaque_ops",
    "support_torch_compile": "onegraph.api",
}
_NEED_TRANSFORMERS = ("LLM", "SamplingParams")
_NEED_TORCH = ("LLM", "SamplingParams", "compile", "eager_break", "load", "opaque", "support_torch_compile")


def __getattr__(name: str) -> Any:
    if name == "errors":
        return importlib.import_module("onegraph.errors")
    if name not in _MODULES:
        raise AttributeError(f"module 'onegraph' has no attribute {name!r}")
    if name in _NEED_TORCH:
        from onegraph.platform_check import require_supported

        require_supported()
    with collected_later():
        if name in _NEED_TORCH:
            timeline.imports("torch")
        if name in _NEED_TRANSFORMERS:
            timeline.imports("onegraph.models", "transformers")
        value = getattr(timeline.imports(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
