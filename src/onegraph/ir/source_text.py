"""Digests of Python code and of the files it comes from, equal in every process that has the same code."""

from __future__ import annotations

import hashlib
import types
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class SourceFile:
    """A file whose functions were inlined: the sha256 of its text, and the digests of these functions' code.

    `as_loaded` says whether the file still held the code that was traced; if not, its text proves nothing.
    """

    path: str
    digest: str
    functions: tuple[tuple[str, str], ...]
    """(qualified name, digest), sorted; a name stands more than once for functions of the same name."""
    as_loaded: bool

    def holds(self) -> bool:
        """Whether a process that imports the file now would trace the same code: its text first, then functions."""
        if not self.as_loaded:
            return False
        try:
            text = Path(self.path).read_bytes()
        except OSError:
            return False
        return hashlib.sha256(text).hexdigest() == self.digest or set(self.functions) <= _functions(text, self.path)


def source_files(codes: Iterable[types.CodeType]) -> tuple[SourceFile, ...]:
    """The files of the given code, by path."""
    by_file: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for code in codes:
        by_file[code.co_filename].add((code.co_qualname, code_digest(code)))
    return tuple(_source_file(path, functions) for path, functions in sorted(by_file.items()))


def _source_file(path: str, functions: set[tuple[str, str]]) -> SourceFile:
    try:
        text = Path(path).read_bytes()
    except OSError:  # typed into a console, or made by exec
        return SourceFile(path, "", tuple(sorted(functions)), as_loaded=False)
    as_loaded = functions <= _functions(text, path)
    return SourceFile(path, hashlib.sha256(text).hexdigest(), tuple(sorted(functions)), as_loaded)


def _functions(text: bytes, path: str) -> set[tuple[str, str]]:
    """Every function of the file, nested ones too; none if it isn't Python."""
    try:
        module = compile(text, path, "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return set()
    return {(code.co_qualname, code_digest(code)) for code in _nested(module)}


def _nested(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _nested(constant)


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
