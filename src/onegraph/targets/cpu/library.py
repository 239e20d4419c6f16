"""All kernels of a piece in one translation unit: one run of the C++ compiler instead of one for each kernel.

Takes kernels as Inductor writes them (a C function named `kernel` below some includes); gives the text of a
Python extension module that holds each distinct one once, in a namespace of its own.

Inductor decides whether a loop is shared among threads for its hint of a size, which for a dynamic one is large.
At a size of 1 the threads then only wait for each other, which costs microseconds on an idle machine and
milliseconds on a busy one; so each parallel region is entered only where its work is worth it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from onegraph.ir.target import KernelSource

MODULE = "onegraph_kernels"
_GRAIN = 32768
"""Elements below which a loop isn't shared among threads: ATen's own grain size."""

_PARALLEL = re.compile(r"#pragma omp parallel(?: num_threads\(\d+\))?$", re.MULTILINE)
_LOOP = re.compile(r"for\(int64_t (\w+)=[^;]*; *\1 *< *static_cast<int64_t>\(((?:[^()]|\([^()]*\))*)\)")
_SIZES_ONLY = re.compile(r"(?:\bks\d+\b|\b\d+L?L?\b|[-+*/%() ])+")
_KERNEL = re.compile(r"^namespace kernel_(\d+) \{$", re.MULTILINE)
_TABLE = "static PyMethodDef methods[] = {"
_METHOD = re.compile(r'  \{"(\w+)", reinterpret_cast<PyCFunction>\(call_(\d+)\)')
_ENTRY = re.compile(r'extern\s+"C"\s+(?=void\s+kernel\s*\()')


def library_source(kernels: Sequence[KernelSource]) -> str:
    """The C++ text of the extension module `onegraph_kernels` with a function for each kernel name."""
    includes: dict[str, None] = {}
    bodies: list[str] = []
    numbers: dict[tuple[str, tuple[str, ...]], int] = {}
    methods: list[str] = []
    for kernel in kernels:
        identity = (kernel.source, kernel.argtypes)
        if identity not in numbers:
            numbers[identity] = len(numbers)
            body = _share_only_large_loops(_hoist_includes(kernel.source, includes))
            bodies.append(_namespaced(numbers[identity], body, kernel))
        methods.append(
            f'  {{"{kernel.name}", reinterpret_cast<PyCFunction>(call_{numbers[identity]}), METH_FASTCALL, nullptr}},'
        )
    return "\n".join(
        [
            *includes,
            (Path(__file__).parent / "bindings.h").read_text(),
            *bodies,
            "static PyMethodDef methods[] = {",
            '  {"bind", onegraph::bind, METH_VARARGS, nullptr},',
            *methods,
            "  {nullptr, nullptr, 0, nullptr}};",
            "static PyModuleDef definition = {",
            f'  PyModuleDef_HEAD_INIT, "{MODULE}", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr}};',
            f"PyMODINIT_FUNC PyInit_{MODULE}(void) {{ return PyModule_Create(&definition); }}",
            "",
        ]
    )


def only_kernels(text: str, names: Mapping[str, str]) -> str:
    """The text of `library_source` without other kernels than these, each below its name in words."""
    code, table, methods = text.partition(_TABLE)
    head, *parts = _KERNEL.split(code)
    kept: list[str] = []
    called: dict[str, list[str]] = {}
    for line in methods.splitlines(keepends=True):
        method = _METHOD.match(line)
        if method is None or method[1] in names:
            kept.append(line)
        if method is not None and method[1] in names:
            called.setdefault(method[2], []).append(names[method[1]])
    bodies = [
        f"// {', '.join(called[number])}\nnamespace kernel_{number} {{{body}"
        for number, body in zip(parts[::2], parts[1::2], strict=True)
        if number in called
    ]
    return "".join([head, *bodies, table, *kept])


def _hoist_includes(source: str, includes: dict[str, None]) -> str:
    lines = []
    for line in source.splitlines():
        if line.lstrip().startswith("#include"):
            includes.setdefault(line.strip())
        else:
            lines.append(line)
    return "\n".join(lines).strip("\n")


def _share_only_large_loops(body: str) -> str:
    """Gives each parallel region a condition on its work: the product of the bounds of its loops' variables."""
    starts = [match.start() for match in _PARALLEL.finditer(body)]
    for start, end in reversed(list(itertools.pairwise([*starts, len(body)]))):
        region = body[start:end]
        bounds = list(dict(_LOOP.findall(region)).values())
        if "ks" not in "".join(bounds) or not all(map(_SIZES_ONLY.fullmatch, bounds)) or _shares_by_hand(region):
            continue
        line, newline, rest = region.partition("\n")
        work = " * ".join(f"({bound})" for bound in bounds)
        body = f"{body[:start]}{line} if({work} > {_GRAIN}){newline}{rest}{body[end:]}"
    return body


def _shares_by_hand(region: str) -> bool:
    """Whether the work is divided by thread numbers, so that it is only whole with all of the threads."""
    uses = re.sub(r"int tid = omp_get_thread_num\(\);|\[tid\]", "", region)
    return "#pragma omp for" not in region or "tid" in uses or "omp_get_" in uses


def _namespaced(number: int, body: str, kernel: KernelSource) -> str:
    """A kernel, and how Python calls it, with the types that its callers know. Its name is what a recording shows."""
    function = f"static_cast<void (*)({', '.join(kernel.argtypes)})>(kernel_{number}::kernel)"
    return "\n".join(
        [
            f"namespace kernel_{number} {{",
            _ENTRY.sub("static ", body),
            "}",
            f"static PyObject* call_{number}(PyObject*, PyObject* const* args, Py_ssize_t given) {{",
            f'  return onegraph::Kernel<{function}>::call("{kernel.name}", args, given);',
            "}",
        ]
    )
