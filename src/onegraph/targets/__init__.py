"""Targets: the devices that onegraph compiles for. Nothing outside this package names a device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from onegraph.config.compilation import CUDAGraphMode
from onegraph.config.resolve import DeviceRules
from onegraph.errors import ConfigError, nearest
from onegraph.ir.target import Target
from onegraph.targets.cpu.march import NAMES, march_named
from onegraph.timeline import timeline

if TYPE_CHECKING:
    import torch

DEVICES = ("auto", "cpu", "cuda")
"""What a `device` setting can be."""
MARCHES = NAMES
"""What `--march` can be."""


def target_for(device_type: str) -> Target:
    """The target of a torch device type. Raises ConfigError for one that this version doesn't compile for."""
    if device_type == "cpu":
        from onegraph.targets.cpu.target import CpuTarget

        return CpuTarget()
    if device_type == "cuda":
        from onegraph.targets.cuda.target import CudaTarget

        return CudaTarget()
    raise ConfigError(
        f"this version doesn't compile for {device_type}",
        where="the module's parameters and inputs",
        hint="move the module to the CPU or to a CUDA device, or run it as it is with -O.mode=NONE",
    )


def target_like(device_type: str, fingerprint: Mapping[str, Any]) -> Target:
    """The target that loads code of this fingerprint, if it runs here; else that of `target_for`, which differs."""
    if device_type == "cpu":
        from onegraph.targets.cpu.target import CpuTarget

        return CpuTarget.like(fingerprint)
    return target_for(device_type)


def target_to_compile_for(device_type: str, march: str | None) -> Target:
    """A target that compiles for another process, and loads nothing in this one. `march` names a CPU's instructions.

    Raises ConfigError for an unknown `march`, and for one with a device whose kernels have none.
    """
    instructions = march_named(march)
    if device_type == "cpu":
        from onegraph.targets.cpu.target import CpuTarget

        return CpuTarget(instructions, runs=False)
    if device_type == "cuda":
        from onegraph.targets.cuda.target import CudaTarget

        if instructions is not None:
            raise ConfigError(
                f"march={march!r} is of a CPU, and kernels for {device_type} are compiled for the GPU that is here",
                where="--march",
                hint="leave it out, or give --device cpu",
            )
        return CudaTarget(runs=False)
    return target_for(device_type)


def host_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros in the host's memory, which take none of it before they are written. Raises MemoryError."""
    return target_for("cpu").zeros(shape, dtype)


def common_device(device_types: Iterable[str]) -> str:
    """The torch device type whose target compiles what runs on all of these: a GPU's, where there is one among them."""
    return min(device_types, key=lambda name: (name == "cpu", name), default="cpu")


def resolve_device(name: str) -> str:
    """The torch device type that a `device` setting comes to: `auto` is CUDA where there is a GPU, else the CPU.

    Raises ConfigError for another name, and for a device that isn't there.
    """
    if name not in DEVICES:
        raise ConfigError(f"device={name!r}", where="device", hint=nearest(str(name), DEVICES))
    if name == "cpu":
        return name
    timeline.imports("torch")
    from onegraph.targets.cuda import device

    missing = device.problem()
    if name == "auto":
        return "cuda" if missing is None else "cpu"
    if missing is not None:
        raise ConfigError(f"device={name!r}, but {missing}", where="device", hint='leave it out, or give "cpu"')
    return name


def describe_device(device_type: str) -> str:
    """A few words on the device, for people."""
    if device_type == "cuda":
        from onegraph.targets.cuda import device

        return device.description()
    from onegraph.targets.cpu.target import CpuTarget

    return _described(CpuTarget().fingerprint())


def describe_target(target: Target) -> str:
    """As `describe_device`, of the machine that a target compiles for."""
    return _described(target.fingerprint()) if target.name == "cpu" else describe_device(target.name)


def _described(facts: Mapping[str, Any]) -> str:
    march = f" ({facts['march']})" if "march" in facts else ""
    return f"CPU, {facts['isa']}{march}, {facts['threads']} threads"


def device_rules(device_type: str, *, batches: bool = False) -> DeviceRules:
    """What configuration may ask for on a torch device type.

    `batches` says that an engine calls, which pads its batches and owns their memory: then batches are recorded that
    run faster so, without being asked for. `bench/results` has the measurements.
    """
    rules = DeviceRules(
        device=device_type,
        cudagraph_modes=frozenset(CUDAGraphMode),
        default_cudagraph_mode=CUDAGraphMode.NONE,
        records_uncompiled=device_type == "cuda",  # a tape has what compiled pieces and our own ops did
    )
    if batches and device_type == "cpu":
        sizes = tuple(range(1, 17))  # each as it is: padding would cost more than it saves
        return replace(rules, default_cudagraph_mode=CUDAGraphMode.FULL_DECODE_ONLY, default_capture_sizes=sizes)
    if batches and device_type == "cuda":
        return replace(rules, default_cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE)
    return rules
