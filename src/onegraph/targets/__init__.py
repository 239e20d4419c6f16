"""Targets: the devices that onegraph compiles for. Nothing outside this package names a device."""

from __future__ import annotations

from onegraph.config.compilation import CUDAGraphMode
from onegraph.config.resolve import DeviceRules
from onegraph.errors import ConfigError
from onegraph.ir.target import Target


def target_for(device_type: str) -> Target:
    """The target of a torch device type. Raises ConfigError for one that this version doesn't compile for."""
    if device_type == "cpu":
        from onegraph.targets.cpu.target import CpuTarget

        return CpuTarget()
    raise ConfigError(
        f"this version doesn't compile for {device_type}",
        where="the module's parameters and inputs",
        hint="move the module to the CPU, or run it as it is with -O.mode=NONE",
    )


def device_rules(device_type: str) -> DeviceRules:
    """What configuration may ask for on a torch device type. No target of this version has recordings yet."""
    return DeviceRules(
        device=device_type,
        cudagraph_modes=frozenset({CUDAGraphMode.NONE}),
        default_cudagraph_mode=CUDAGraphMode.NONE,
    )
