"""Triton's kernels as files that people edit: which there are, and that an edit is what is compiled. Needs no GPU."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from onegraph.errors import CompileError
from onegraph.ir.target import KernelSource
from onegraph.targets.cuda import triton_build

NAMES = {"kernel_1": "triton_poi_0"}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    path = tmp_path / triton_build.KERNELS
    with zipfile.ZipFile(path, "w") as packed:
        packed.writestr("kernels.json", json.dumps({"kernel_1": "one", "kernel_2": "two"}))
        packed.writestr("kernel_1.py", "tmp0 = 1.0")
        packed.writestr("kernel_2.py", "tmp0 = 2.0")
    return {triton_build.KERNELS: path}


def edited(folder: Path, text: str) -> dict[str, Path]:
    (folder / "triton_poi_0.py").write_text(text)
    return {"triton_poi_0.py": folder / "triton_poi_0.py"}


def test_a_piece_has_its_own_kernels_by_their_names_in_the_wrapper(files: dict[str, Path]) -> None:
    assert triton_build.kernel_texts(files, NAMES) == {"triton_poi_0.py": "tmp0 = 1.0"}
    assert triton_build.kernel_texts({}, NAMES) == {}


def test_only_an_edit_is_compiled(files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Sequence[KernelSource]] = []

    def build(kernels: Sequence[KernelSource]) -> dict[str, bytes]:
        built.append(kernels)
        return {triton_build.KERNELS: b"new"}

    monkeypatch.setattr(triton_build, "build_triton_kernels", build)
    assert triton_build.build_edited_kernels(files, NAMES, edited(tmp_path, "tmp0 = 1.0")) == {} and not built
    assert triton_build.build_edited_kernels(files, NAMES, edited(tmp_path, "tmp0 = 3.0")) == {"triton.zip": b"new"}
    assert built == [[KernelSource("kernel_1", (), "tmp0 = 3.0", "triton", "one")]]


def test_an_edit_that_triton_refuses_is_an_error_that_names_the_file(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(kernels: Sequence[KernelSource]) -> dict[str, bytes]:
        raise CompileError("Triton failed")

    monkeypatch.setattr(triton_build, "build_triton_kernels", build)
    with pytest.raises(CompileError) as caught:
        triton_build.build_edited_kernels(files, NAMES, edited(tmp_path, "tmp0 ="))
    assert caught.value.where == str(tmp_path / "triton_poi_0.py")
