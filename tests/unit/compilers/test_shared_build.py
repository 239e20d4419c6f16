"""One build for several pieces, on a target that builds nothing: who gets what, and whose error it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from onegraph.compilers.shared_build import SharedBuild
from onegraph.errors import CompileError
from onegraph.ir.target import KernelSource


@dataclass
class Lowered:
    kernels: tuple[KernelSource, ...]


class Build:
    def __init__(self, kernels: Sequence[KernelSource]) -> None:
        self.names, self.ended = [kernel.name for kernel in kernels], False

    def files(self) -> dict[str, bytes]:
        if "bad" in self.names:
            raise CompileError(f"no: {self.names}")
        return {"kernels.so": " ".join(self.names).encode()}

    def cancel(self) -> None:
        self.ended = True


class Target:
    def __init__(self) -> None:
        self.builds: list[Build] = []

    def start_build(self, kernels: Sequence[KernelSource]) -> Build:
        self.builds.append(Build(kernels))
        return self.builds[-1]


def pieces(*names: str) -> list[Any]:
    return [Lowered(tuple(KernelSource(name, (), "") for name in text.split())) for text in names]


def test_pieces_share_one_library_that_has_equal_kernels_once() -> None:
    target, (one, other, none) = Target(), pieces("a b", "b c", "")
    build: Any = SharedBuild(target, [one, other, none])  # type: ignore[arg-type]
    assert build.files_for(one) == build.files_for(other) == {"kernels.so": b"a b c"}
    assert build.files_for(none) == {}
    assert len(target.builds) == 1


def test_an_error_is_about_the_piece_that_caused_it() -> None:
    target, (one, other) = Target(), pieces("a", "bad")
    build: Any = SharedBuild(target, [one, other])  # type: ignore[arg-type]
    assert build.files_for(one) == {"kernels.so": b"a"}
    with pytest.raises(CompileError, match=r"no: \['bad'\]"):
        build.files_for(other)


def test_a_single_piece_is_not_built_twice() -> None:
    target, (one, none) = Target(), pieces("bad", "")
    build: Any = SharedBuild(target, [one, none])  # type: ignore[arg-type]
    with pytest.raises(CompileError):
        build.files_for(one)
    assert len(target.builds) == 1


def test_what_nobody_waited_for_is_ended() -> None:
    target, (one,) = Target(), pieces("a")
    SharedBuild(target, [one]).cancel()  # type: ignore[arg-type]
    assert target.builds[0].ended
