"""Loads a transformers model from a folder or hub id: config, tokenizer, weights, ready for a flat batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging as transformers_logging

from onegraph.counters import counters
from onegraph.errors import ConfigError, ModelError, nearest
from onegraph.log import get_logger
from onegraph.models.architectures import check_architecture, max_positions
from onegraph.models.attention import ATTENTION, register
from onegraph.models.experts import experts_argument, register_experts
from onegraph.models.flat_model import FlatModel
from onegraph.models.rotary import fix_frequencies
from onegraph.models.without_weights import Zeros, without_weights

log = get_logger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class KVLayout:
    """The KV cache that the model needs: the same for every layer."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory. `weight_bytes` counts tied weights once.

    `max_model_len` is the config's, or less where rotary frequencies would change beyond (see `rotary.py`).
    """

    module: FlatModel
    config: Any
    tokenizer: Any
    generation_config: Any
    name: str
    kv: KVLayout
    max_model_len: int
    num_parameters: int
    weight_bytes: int


def load_model(
    path_or_id: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: Callable[[str], Any] | None = None,
    zeros: Zeros | None = None,
) -> LoadedModel:
    """Loads a decoder-only model. `progress` is told the name of each step when it begins.

    With `zeros`, which makes a tensor of a shape and dtype, no weights are read: zeros that it makes stand in their
    places, and the files needn't be there.

    `dtype` "auto" is the checkpoint's. Python code that comes with a model runs only with `trust_remote_code`.
    Raises ModelError: nothing there, an architecture that isn't supported, weights that the files don't hold.
    ConfigError: no such dtype.
    """
    step = progress or (lambda name: None)
    where, wanted = str(path_or_id), _dtype(dtype)
    step("config")
    config = _read(where, "config", lambda: AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code))
    layout = check_architecture(config, trust_remote_code)
    register()
    register_experts()
    step("tokenizer")
    tokenizer = _read(
        where, "tokenizer", lambda: AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code)
    )
    step("weights")
    settings = {"dtype": wanted, "attn_implementation": ATTENTION, "trust_remote_code": trust_remote_code}
    settings |= experts_argument(config)
    with _QuietTransformers():
        if zeros is not None:
            model, found = _read(where, "model", lambda: without_weights(where, config, settings, device, zeros))
        else:
            model, found = _read(
                where,
                "weights",
                lambda: AutoModelForCausalLM.from_pretrained(
                    where, config=config, output_loading_info=True, **settings
                ),
            )
            model = model.to(device)
    _check_complete(where, found)
    model = model.eval().requires_grad_(False)
    parameters = list(model.parameters())
    max_model_len, fixed_to = max_positions(config), fix_frequencies(model)
    if fixed_to is not None and fixed_to < max_model_len:
        counters.add("downgrades")
        log.warning(
            "%s: contexts of %d tokens, not %d: beyond, the rotary frequencies of all tokens of a call would change",
            where, fixed_to, max_model_len,
        )  # fmt: skip
        max_model_len = fixed_to
    return LoadedModel(
        module=FlatModel(model),
        config=config,
        tokenizer=tokenizer,
        generation_config=getattr(model, "generation_config", None) or GenerationConfig(),
        name=Path(where).name if Path(where).exists() else where,
        kv=KVLayout(layout.num_layers, layout.num_kv_heads, layout.head_dim, parameters[0].dtype),
        max_model_len=max_model_len,
        num_parameters=sum(p.numel() for p in parameters),
        weight_bytes=sum(p.numel() * p.element_size() for p in parameters),
    )


def _check_complete(where: str, found: dict[str, Any]) -> None:
    """transformers fills weights that the files don't hold with random numbers."""
    missing = sorted(found["missing_keys"])
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ModelError(
            f"the files of {where!r} don't hold {len(missing)} of the model's weights: {', '.join(missing[:3])}{more}",
            where=where,
            hint="download the model again, or check that config.json belongs to these weights",
        )
    unexpected = sorted(found["unexpected_keys"])
    if unexpected:
        log.warning("%s: %d weights aren't used: %s", where, len(unexpected), ", ".join(unexpected[:5]))


def _dtype(dtype: str | torch.dtype) -> Any:
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ConfigError(f"dtype={dtype!r}", where="dtype", hint=nearest(name, ["auto", *DTYPES]))
    return DTYPES[name]


def _read(where: str, what: str, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except (ModelError, ConfigError):
        raise
    except Exception as error:
        folder = Path(where)
        hint = "give a folder with config.json, tokenizer files and safetensors, or the id of a model on the hub"
        if folder.is_dir():
            names = sorted(p.name for p in folder.iterdir())
            hint = f"the folder holds {', '.join(names[:12]) or 'nothing'}"
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelError(f"the {what} of {where!r} can't be loaded: {first}", where=where, hint=hint) from error


class _QuietTransformers:
    """Turns transformers' own bars and messages off while a model is loaded; ours stand in their place."""

    def __enter__(self) -> None:
        self.verbosity = transformers_logging.get_verbosity()
        self.bars = transformers_logging.is_progress_bar_enabled()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()

    def __exit__(self, *exception: object) -> None:
        transformers_logging.set_verbosity(self.verbosity)
        if self.bars:
            transformers_logging.enable_progress_bar()
