"""A transformers model as `from_pretrained` makes it, with zeros for weights: no file of weights is opened.

The zeros take no memory where they are made so, and nobody writes them. Buffers that aren't weights, such as rotary
frequencies, have their values.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from onegraph.errors import ConfigError

Zeros = Callable[[tuple[int, ...], torch.dtype], torch.Tensor]
"""Makes a tensor in the host's memory."""


def without_weights(
    where: str, config: Any, settings: Mapping[str, Any], device: str, zeros: Zeros
) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The model on the device, and what `from_pretrained` says of its weights: none is missing.

    `settings` are further arguments of `from_pretrained`. Raises ConfigError where only the weights tell their dtype.
    """
    dtype = settings["dtype"]
    if dtype == "auto":
        dtype = getattr(config, "dtype", None)
    if dtype is None:
        raise ConfigError(
            f"the config of {where!r} doesn't say the dtype of its weights, and they aren't read",
            where="dtype",
            hint="give --dtype float32, bfloat16 or float16: that of the checkpoint, which is also --dtype of the run",
        )
    settings = {**settings, "dtype": dtype}
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(copy.deepcopy(config), **settings)
    tied = getattr(shapes, "all_tied_weights_keys", {})
    weights = {
        name: zeros(tuple(value.shape), value.dtype) for name, value in shapes.state_dict().items() if name not in tied
    }
    model, found = type(shapes).from_pretrained(
        None, config=config, state_dict=weights, output_loading_info=True, **settings
    )
    return model._apply(lambda one: _moved(one, device)), found


def _moved(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """Memory of the device for a weight, whose values don't matter; anything else as it is."""
    if isinstance(tensor, torch.nn.Parameter) and tensor.device.type != device:
        return torch.empty_like(tensor, device=device)
    return tensor.to(device)
