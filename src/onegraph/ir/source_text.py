"""Digests of Python code, equal in every process that has the same code."""

from __future__ import annotations

import hashlib
import types


def code_digest(code: types.CodeType) -> str:
    """sha256 of a function's bytecode, names and constants, without its file and line numbers."""
    digest = hashlib.sha256(code.co_code)
    digest.update(repr((code.co_names, code.co_varnames, code.co_freevars)).encode())
    for constant in code.co_consts:
        text = code_digest(constant) if isinstance(constant, types.CodeType) else _shown(constant)
        digest.update(text.encode())
    return digest.hexdigest()


def _shown(constant: object) -> str:
    if isinstance(constant, frozenset):  # its order differs between processes
        return repr(sorted(map(repr, constant)))
    return f"{type(constant).__name__} {constant!r}"
