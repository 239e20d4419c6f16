"""Targets: the devices that onegraph compiles for. Nothing outside this package names a device."""

from __future__ import annotations

from collections.abc import Iterable

from onegraph.config.compilation import CUDAGraphMode
from onegraph.config.resolve import DeviceRules
from onegraph.errors import ConfigError, nearest
from onegraph.ir.target import Target

DEVICES = ("auto", "cpu", "cuda")
"""What a `device` setting can be."""


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

    facts = CpuTarget().fingerprint()
    return f"CPU, {facts['isa']}, {facts['threads']} threads"


def device_rules(device_type: str) -> DeviceRules:
    """What configuration may ask for on a torch device type. No target of this version has recordings yet."""
    return DeviceRules(
        device=device_type,
        cudagraph_modes=frozenset({CUDAGraphMode.NONE}),
        default_cudagraph_mode=CUDAGraphMode.NONE,
    )
