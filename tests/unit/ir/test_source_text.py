"""Files whose functions were traced: told apart by text first, then by the code of these functions."""

from __future__ import annotations

import importlib.util
import types
from pathlib import Path
from typing import Any

from onegraph.ir.source_text import code_digest, source_files

TEXT = """
def scale(x):
    return x * 2

def unused(x):
    return x
"""


def load(path: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(path: Path, text: str) -> Any:
    path.write_text(text)
    return load(path)


def test_a_file_holds_until_a_traced_function_changes(tmp_path: Path) -> None:
    path = tmp_path / "model.py"
    (source,) = source_files([write(path, TEXT).scale.__code__])
    assert (source.path, source.as_loaded, source.holds()) == (str(path), True, True)
    assert [name for name, _ in source.functions] == ["scale"]
    path.write_text("# a comment\n" + TEXT.replace("return x\n", "return -x\n"))
    assert source.holds(), "another function of the file"
    path.write_text(TEXT.replace("x * 2", "x * 3"))
    assert not source.holds()
    path.write_text("not Python (")
    assert not source.holds()
    path.unlink()
    assert not source.holds()


def test_a_file_edited_after_its_import_proves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "model.py"
    code = write(path, TEXT).scale.__code__
    path.write_text(TEXT.replace("x * 2", "x * 3"))
    (source,) = source_files([code])
    assert (source.as_loaded, source.holds()) == (False, False)


def test_code_without_a_file_proves_nothing() -> None:
    names: dict[str, Any] = {}
    exec("def typed(x):\n    return x", names)
    (source,) = source_files([names["typed"].__code__])
    assert (source.as_loaded, source.holds()) == (False, False)


def test_digests_tell_nested_functions_constants_and_signs() -> None:
    def digest(text: str) -> str:
        names: dict[str, Any] = {}
        exec(text, names)
        return code_digest(names["f"].__code__)

    base = digest("def f():\n    return lambda: 1.0")
    assert base == digest("\n\ndef f():\n    return lambda: 1.0")
    assert base != digest("def f():\n    return lambda: 2.0")
    assert digest("def f():\n    return 0.0") != digest("def f():\n    return -0.0")
    assert digest("def f():\n    return 1") != digest("def f():\n    return True")
    assert digest("def f(x):\n    return x in {'a', 'b'}") == digest("def f(x):\n    return x in {'b', 'a'}")
