"""All kernels of a piece in one translation unit: one run of the C++ compiler instead of one for each kernel.

Takes kernels as Inductor writes them (a C function named `kernel` below some includes); gives the text of a
Python extension module that holds each distinct one once, in a namespace of its own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from onegraph.ir.target import KernelSource

MODULE = "onegraph_kernels"
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
            body = _hoist_includes(kernel.source, includes)
            bodies.append(_namespaced(numbers[identity], body, kernel.argtypes))
        methods.append(
            f'  {{"{kernel.name}", reinterpret_cast<PyCFunction>(call_{numbers[identity]}), METH_FASTCALL, nullptr}},'
        )
    return "\n".join(
        [
            *includes,
            (Path(__file__).parent / "bindings.h").read_text(),
            *bodies,
            "static PyMethodDef methods[] = {",
            '  {"bind", onegraph::bind, METH_O, nullptr},',
            *methods,
            "  {nullptr, nullptr, 0, nullptr}};",
            f'static PyModuleDef definition = {{PyModuleDef_HEAD_INIT, "{MODULE}", nullptr, -1, methods}};',
            f"PyMODINIT_FUNC PyInit_{MODULE}(void) {{ return PyModule_Create(&definition); }}",
            "",
        ]
    )


def _hoist_includes(source: str, includes: dict[str, None]) -> str:
    lines = []
    for line in source.splitlines():
        if line.lstrip().startswith("#include"):
            includes.setdefault(line.strip())
        else:
            lines.append(line)
    return "\n".join(lines).strip("\n")


def _namespaced(number: int, body: str, argtypes: tuple[str, ...]) -> str:
    arguments = ", ".join(
        f"onegraph::argument<{_parsed_type(argtype)}>(args[{i}])" for i, argtype in enumerate(argtypes)
    )
    return "\n".join(
        [
            f"namespace kernel_{number} {{",
            _ENTRY.sub("static ", body),
            "}",
            f"static PyObject* call_{number}(PyObject*, PyObject* const* args, Py_ssize_t given) {{",
            f"  return onegraph::guarded(given, {len(argtypes)}, [&] {{ kernel_{number}::kernel({arguments}); }});",
            "}",
        ]
    )


def _parsed_type(argtype: str) -> str:
    """A scalar's const is dropped; a pointer keeps what it points to."""
    return argtype if "*" in argtype else argtype.replace("const ", "").strip()
