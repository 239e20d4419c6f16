"""A flat model without weights that reads its context through the block tables, and an engine around it.

The next token is a function of all tokens before it and their order, read back from the KV cache: a wrong
slot, block, length or position changes the text. `expected_tokens` is the same function in plain Python.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from onegraph.engine.assemble import assemble_engine
from onegraph.engine.engine import Engine
from onegraph.engine.kv_cache import KVCachePlan, LayerKV
from onegraph.engine.limits import Limits
from onegraph.engine.outputs import RequestOutput
from onegraph.engine.text import Text
from onegraph.targets.cpu.target import CpuTarget

VOCAB = 101
LAYER = LayerKV(num_kv_heads=1, head_dim=1, dtype=torch.float32)


def next_token(token_ids: list[int]) -> int:
    """What the fake model's largest logit is at."""
    return (sum((at + 1) * (token + 3) for at, token in enumerate(token_ids)) * 7 + 5) % VOCAB


def expected_tokens(prompt: list[int], num_tokens: int) -> list[int]:
    """Greedy tokens."""
    token_ids = list(prompt)
    for _ in range(num_tokens):
        token_ids.append(next_token(token_ids))
    return token_ids[len(prompt) :]


def row_logits(token_ids: list[int]) -> Tensor:
    """The logits behind these tokens, [V]: they differ for each token and are largest at `next_token`."""
    logits = torch.cos(torch.arange(VOCAB) * (1.0 + sum(token_ids) % 17))
    logits[next_token(token_ids)] = 3.0
    return logits


class FakeModel:
    """Counts calls and tokens; `before_call(inputs)` may raise; `edit(logits)` may change what comes out."""

    def __init__(self) -> None:
        self.num_tokens: list[int] = []
        self.num_state_checks = 0
        self.warm: dict[str, Any] | None = None
        self.before_call: Callable[[dict[str, Any]], None] = lambda inputs: None
        self.edit: Callable[[Tensor], Tensor] = lambda logits: logits

    def warm_up(self, example_kwargs: dict[str, Any], /) -> None:
        self.warm = example_kwargs

    def check_state(self) -> bool:
        self.num_state_checks += 1
        return True

    def demote(self, error: BaseException) -> bool:
        return False

    @property
    def original(self) -> Any:
        return self

    def __call__(self, **inputs: Any) -> Tensor:
        assert torch.is_inference_mode_enabled()
        self.before_call(inputs)
        ids, positions, slots = inputs["input_ids"], inputs["positions"], inputs["slot_mapping"]
        starts, lens, tables = inputs["query_start_loc"], inputs["seq_lens"], inputs["block_tables"]
        assert ids.dtype == positions.dtype == slots.dtype == inputs["logits_indices"].dtype == torch.int64
        assert starts.dtype == lens.dtype == tables.dtype == torch.int32
        assert (
            len(ids) == len(positions) == len(slots) == starts[-1] and len(starts) == len(lens) + 1 == len(tables) + 1
        )
        assert all(tensor.is_contiguous() and tensor.data_ptr() % 64 == 0 for tensor in (ids, starts, tables))
        self.num_tokens.append(len(ids))
        (k_cache, v_cache), block_size = inputs["kv_caches"][0], inputs["kv_caches"][0][0].shape[1]
        k_cache.view(-1)[slots] = ids.float()
        v_cache.view(-1)[slots] = positions.float()
        contexts = []
        for r in range(len(lens)):
            length, num_new = int(lens[r]), int(starts[r + 1] - starts[r])
            at = torch.arange(length)
            context_slots = tables[r, at // block_size] * block_size + at % block_size
            assert v_cache.view(-1)[context_slots].tolist() == at.tolist()
            context = k_cache.view(-1)[context_slots].int().tolist()
            contexts += [context[:end] for end in range(length - num_new + 1, length + 1)]
            assert positions[starts[r] : starts[r + 1]].tolist() == at[length - num_new :].tolist()
        return self.edit(torch.stack([row_logits(contexts[i]) for i in inputs["logits_indices"].tolist()]))


class Letters:
    """A tokenizer with a letter pair for each token; the last token is special."""

    chat_template = None

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) % VOCAB for c in text]}

    def decode(self, ids: list[int], skip_special_tokens: bool = False, **_: Any) -> str:
        return "".join(letters(i) for i in ids if not (skip_special_tokens and i == VOCAB - 1))


def letters(token_id: int) -> str:
    """The text of a token."""
    return chr(97 + token_id // 26) + chr(97 + token_id % 26)


def make_engine(
    *,
    num_blocks: int = 64,
    block_size: int = 4,
    max_model_len: int = 64,
    max_num_seqs: int = 8,
    budget: int = 32,
    caching: bool = True,
    eos: frozenset[int] = frozenset(),
    tokenizer: Any = None,
) -> tuple[Engine, FakeModel]:
    """An engine around a fake model."""
    model = FakeModel()
    kv_cache = KVCachePlan(num_blocks, block_size, 8 * block_size, "test")
    limits = Limits(max_model_len, max_model_len, max_num_seqs, budget, kv_cache)
    engine = assemble_engine(
        model,
        layers=[LAYER],
        limits=limits,
        text=Text(tokenizer or Letters()),
        vocab_size=VOCAB,
        eos_token_ids=eos,
        target=CpuTarget(),
        enable_prefix_caching=caching,
    )
    return engine, model


def drain(engine: Engine, max_steps: int = 3000) -> dict[str, RequestOutput]:
    """Steps until nothing is left; the last output of each request."""
    outputs: dict[str, RequestOutput] = {}
    for _ in range(max_steps):
        if not engine.has_unfinished():
            return outputs
        outputs.update({output.request_id: output for output in engine.step()})
    raise AssertionError("the engine does not finish")
