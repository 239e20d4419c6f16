"""Graphs that look the same and aren't: what one was compiled to is never used for the other."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import onegraph


def compiled_once(model: Any, *args: Any) -> tuple[Any, str]:
    compiled = onegraph.compile(model, config={"backend": "inductor"})
    result = compiled(*args)
    return result, compiled.explain().pieces[0].ranges[0].store


def test_inputs_that_share_storage_have_another_key(fresh_cache: Path) -> None:
    def model(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        a.add_(1)
        return a * 3 + b

    assert compiled_once(model, torch.ones(3), torch.ones(3))[1] == "miss"
    shutil.rmtree(fresh_cache / "index")  # whose build is right for both: it refuses inputs that overlap
    x, y = torch.ones(8), torch.ones(8)
    result, store = compiled_once(model, x[:3], x[4:7])
    assert torch.equal(result, model(y[:3], y[4:7])) and torch.equal(x, y)
    assert store == "miss"


@pytest.mark.usefixtures("fresh_cache")
def test_functions_put_into_the_graph_as_they_are_have_no_key() -> None:
    """Their code names what they call, and what that does nobody can digest."""
    for name in ("sin", "cos"):
        namespace: dict[str, Any] = {"torch": torch, "__name__": "users_module"}
        exec(f"def act(x):\n    return torch.{name}(x)", namespace)
        act = torch.compiler.allow_in_graph(namespace["act"])
        result, store = compiled_once(lambda x, act=act: act(x) * 2, torch.ones(3))
        torch.testing.assert_close(result, getattr(torch, name)(torch.ones(3)) * 2)
        assert store == "off"


def test_operators_made_of_python_code_have_no_key(fresh_cache: Path) -> None:
    """A composite operator is traced through, so its code is compiled in."""
    for factor in (2, 3):
        library = torch.library.Library("onegraph_same_graph", "FRAGMENT")
        library.define("scale(Tensor x) -> Tensor")
        library.impl("scale", lambda x, factor=factor: x * factor, "CompositeImplicitAutograd")
        result, store = compiled_once(lambda x: torch.ops.onegraph_same_graph.scale(x) + 1, torch.ones(3))
        assert torch.equal(result, torch.full((3,), factor + 1.0)) and store == "off"
        library._destroy()
    assert not list((fresh_cache / "entries").rglob("manifest.json"))
