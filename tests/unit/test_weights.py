"""Merged weights: what can be merged and why not, where everything lies afterwards, and what others see of it."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import LlamaConfig, LlamaForCausalLM

from onegraph.counters import counters
from onegraph.ir.graph import WeightInput
from onegraph.weights import BoundGroups, WeightStore, held_tensors


class Attention(nn.Module):
    """Three projections of one input, with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 16)
        self.k = nn.Linear(8, 4)
        self.v = nn.Linear(8, 4)
        self.seen: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.q(x), self.k(x), self.v(x)], -1)


def elements(itemsize: int) -> int:
    return itemsize


def module() -> Attention:
    torch.manual_seed(0)
    return Attention()


def inputs(m: nn.Module, names: str = "q k v", what: str = "weight") -> list[WeightInput]:
    return [WeightInput(f"{name}.{what}", getattr(m, name)._parameters, what) for name in names.split()]


def merge(m: nn.Module, store: WeightStore | None = None, names: str = "q k v", again: bool = False) -> torch.Tensor:
    (whole,) = (store or WeightStore(m)).merge([inputs(m, names)], elements, again)
    assert whole is not None
    return whole


def is_merged(m: Attention, whole: torch.Tensor) -> bool:
    """Whether the rows of the merged tensor are the parameters' own memory."""
    parts = [m.q.weight, m.k.weight, m.v.weight]
    starts = [part.data_ptr() for part in whole.split([16, 4, 4])]
    return starts == [part.data_ptr() for part in parts] and torch.equal(whole, torch.cat(parts))


def test_parameters_become_views_and_stay_the_same_objects() -> None:
    m = module()
    before, values = list(m.parameters()), copy.deepcopy(m.state_dict())
    with counters.expect(weights_merged=3, weights_merged_again=0):
        whole = merge(m)
    assert is_merged(m, whole)
    assert all(was is now for was, now in zip(before, m.parameters(), strict=True))
    assert all(torch.equal(values[name], value) for name, value in m.state_dict().items())
    assert m.q.weight.requires_grad and m.q.weight.is_leaf
    assert not whole.requires_grad


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_the_caller_s_mode_doesn_t_matter(mode: Callable[[], Any]) -> None:
    m = module()
    with mode():
        whole = merge(m)
    assert is_merged(m, whole)
    assert not whole.is_inference() and not m.q.weight.is_inference()
    m(torch.ones(2, 8)).sum().backward()
    with torch.no_grad():
        m.q.weight.add_(1.0)
    assert is_merged(m, whole)


def test_what_lies_right_already_isn_t_copied() -> None:
    m = module()
    whole = merge(m)
    with counters.expect(weights_merged=0, weights_merged_again=0):
        other = merge(m)  # another compiled model of the same module
        part = merge(m, names="k v")
    assert other.data_ptr() == whole.data_ptr()
    assert part.data_ptr() == m.k.weight.data_ptr() and torch.equal(part, whole[16:])


def test_tied_parameters_stay_tied() -> None:
    m = module()
    m.head = nn.Linear(8, 16)
    m.head.weight = m.q.weight
    whole = merge(m)
    assert m.head.weight is m.q.weight
    with torch.no_grad():
        m.head.weight.fill_(3.0)
    assert is_merged(m, whole)


def change(name: str, value: Callable[[Attention], Any]) -> Callable[[Attention], None]:
    return lambda m: setattr(getattr(m, name), "weight", value(m))


def set_data(name: str, value: Callable[[Attention], torch.Tensor]) -> Callable[[Attention], None]:
    return lambda m: setattr(getattr(m, name).weight, "data", value(m))


class Special(torch.Tensor):
    """A tensor of another class."""


WHY_NOT: dict[str, tuple[Callable[[Attention], None], str]] = {
    "a view of another": (set_data("k", lambda m: m.q.weight.data[:4]), "overlap"),
    "tied to one outside of the group": (
        lambda m: m.register_buffer("rows", m.k.weight.data[:2]),
        "k.weight shares memory with rows",
    ),
    "a view in a list": (lambda m: m.seen.append(m.v.weight.data), "v.weight shares memory with seen.0"),
    "the same memory by way of numpy": (
        lambda m: m.register_buffer("rows", torch.from_numpy(m.q.weight.detach().numpy())),
        "q.weight shares memory with rows",
    ),
    "transposed": (change("k", lambda m: nn.Parameter(torch.ones(8, 4).t())), "k.weight isn't contiguous"),
    "other strides of one row": (
        change("k", lambda m: nn.Parameter(torch.ones(1, 8).as_strided((1, 8), (99, 1)))),
        "isn't contiguous",
    ),
    "another dtype": (change("v", lambda m: nn.Parameter(m.v.weight.bfloat16())), "v.weight is of another dtype"),
    "other rows": (change("v", lambda m: nn.Parameter(torch.ones(4, 9))), "length of rows"),
    "a subclass": (change("v", lambda m: nn.Parameter(m.v.weight.data.as_subclass(Special))), "not a plain tensor"),
    "sparse": (change("v", lambda m: nn.Parameter(torch.eye(4, 8).to_sparse())), "plain rows"),
    "meta": (lambda m: m.to("meta") and None, "no rows in memory"),
    "no rows": (change("v", lambda m: nn.Parameter(torch.ones(0, 8))), "no rows"),
    "deleted": (lambda m: delattr(m.v, "weight"), "NoneType"),
    "shared with other processes": (lambda m: setattr(m, "k", m.k.share_memory()), "shared with other processes"),
    "the same one twice": (change("v", lambda m: m.k.weight), "the same tensor"),
    "complex": (change("k", lambda m: nn.Parameter(torch.ones(4, 8, dtype=torch.complex64))), "plain rows"),
    "negated": (set_data("v", lambda m: torch._neg_view(m.v.weight.data)), "plain rows"),
}


@pytest.mark.parametrize("name", WHY_NOT)
def test_why_weights_can_t_be_merged(name: str) -> None:
    spoil, why = WHY_NOT[name]
    m = module()
    spoil(m)
    places = [parameter.data_ptr() for parameter in m.parameters() if parameter.layout == torch.strided]
    assert why in str(WeightStore(m).survey(elements).why_not(inputs(m)))
    with counters.expect(weights_merged=0, weights_not_merged=1):
        assert WeightStore(m).merge([inputs(m)], elements) == [None]
    assert places == [parameter.data_ptr() for parameter in m.parameters() if parameter.layout == torch.strided]


def other_places(m: Attention) -> None:
    flat = torch.rand(24 * 8)
    for start, linear in ((0, m.q), (160, m.k), (128, m.v)):
        linear.weight.data = flat[start : start + linear.weight.numel()].view_as(linear.weight)


def test_parts_of_one_storage_in_another_order() -> None:
    m = module()
    other_places(m)
    assert is_merged(m, merge(m))


def test_a_parameter_made_in_inference_mode() -> None:
    with torch.inference_mode():
        m = module()
    assert "inference mode" in str(WeightStore(m).survey(elements).why_not(inputs(m)))


def test_a_tensor_that_the_module_doesn_t_hold() -> None:
    m = module()
    sources = [*inputs(m), WeightInput("free", {"": torch.ones(4, 8)}, "")]
    assert WeightStore(m).survey(elements).why_not(sources) == "free isn't a tensor that the module holds"


def test_another_order_or_group_of_what_is_merged() -> None:
    m = module()
    store = WeightStore(m)
    whole = merge(m, store)
    for other in ("k q", "q v", "v q k"):
        assert "merged already" in str(store.survey(elements).why_not(inputs(m, other)))
    assert store.survey(elements).why_not(inputs(m, "q k")) is None
    assert is_merged(m, whole)


def test_a_part_of_what_is_merged_stays_a_part() -> None:
    """What two graphs merge, one of them less: each finds its own after a weight was replaced, in either order."""
    m = module()
    store = WeightStore(m)
    merge(m, store)
    merge(m, store, "k v")
    for order in (("q k v", "k v"), ("k v", "q k v")):
        m.k.weight = nn.Parameter(torch.rand(4, 8))
        for _ in range(2):
            found = {names: merge(m, store, names) for names in order}
        assert is_merged(m, found["q k v"])
        assert found["k v"].data_ptr() == m.k.weight.data_ptr()


def test_an_alignment_that_rows_don_t_have() -> None:
    m = module()
    m.q = nn.Linear(8, 2)
    assert WeightStore(m).survey(lambda itemsize: 64).why_not(inputs(m)) is None
    assert "multiple of 128 bytes" in str(WeightStore(m).survey(lambda itemsize: 128).why_not(inputs(m)))
    assert "bias" in str(WeightStore(m).survey(lambda itemsize: 16).why_not(inputs(m, what="bias")))


def test_a_parametrized_weight_is_no_parameter_of_its_own() -> None:
    m = module()
    nn.utils.parametrizations.weight_norm(m.k)
    assert "NoneType" in str(WeightStore(m).survey(elements).why_not(inputs(m)))


def test_names_of_the_tensors_that_a_module_holds() -> None:
    m = module()
    m.seen.append(torch.ones(1))
    m.cache: Any = {"a": [torch.ones(1)]}
    m.cache["itself"] = m.cache
    m.free = torch.ones(2)
    m.register_buffer("rows", torch.ones(1), persistent=False)
    names = {name for name, _ in held_tensors(m)}
    assert names == {f"{n}.{what}" for n in "qkv" for what in ("weight", "bias")} | {
        *("seen.0", "cache.a.0", "free", "rows")
    }


AGAIN: dict[str, Callable[[Attention], Any]] = {
    "a new Parameter": change("k", lambda m: nn.Parameter(torch.ones(4, 8))),
    "data": set_data("k", lambda m: torch.ones(4, 8)),
    "data with a copy of the same values": set_data("k", lambda m: m.k.weight.data.clone()),
    "loaded by assignment": lambda m: m.load_state_dict(
        {name: value + 1 for name, value in m.state_dict().items()}, assign=True
    ),
    "swapped modules": lambda m: (setattr(m, "k", nn.Linear(8, 4)), None)[1],
    "two exchanged": lambda m: (
        (k := m.k.weight.data),
        setattr(m.k.weight, "data", m.v.weight.data),
        setattr(m.v.weight, "data", k),
    ),
    "there and back": lambda m: m.double() and m.float(),
    "deleted and put back": lambda m: (delattr(m.k, "weight"), setattr(m.k, "weight", nn.Parameter(torch.ones(4, 8)))),
}


@pytest.mark.parametrize("name", AGAIN)
def test_a_replaced_weight_is_merged_again(name: str, caplog: pytest.LogCaptureFixture) -> None:
    m = module()
    store = WeightStore(m)
    whole = merge(m, store)
    AGAIN[name](m)
    with counters.expect(weights_merged_again=3):
        whole = merge(m, store, again=True)
    assert is_merged(m, whole)
    assert sum("merged again" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("reread", [lambda t: t.view(torch.int32), lambda t: t.view(-1, 4)], ids=["dtype", "shape"])
def test_memory_that_is_read_in_another_way(reread: Callable[[torch.Tensor], torch.Tensor]) -> None:
    m = module().requires_grad_(False)
    store = WeightStore(m)
    merge(m, store)
    for linear in (m.q, m.k, m.v):
        linear.weight.data = reread(linear.weight.data)
    assert torch.equal(merge(m, store, again=True), torch.cat([m.q.weight, m.k.weight, m.v.weight]))


def test_sharing_with_other_processes_ends_the_merge() -> None:
    m = module()
    store = WeightStore(m)
    merge(m, store)
    m.share_memory()
    assert store.merge([inputs(m)], elements, again=True) == [None]
    assert m.q.weight.is_shared()


def test_only_the_sources_own_the_memory() -> None:
    m = module()
    bound = BoundGroups(WeightStore(m), inputs(m), [(0, 1, 2)], elements)
    storages = [StorageWeakRef(parameter.untyped_storage()) for parameter in (m.q.weight, m.k.weight, m.v.weight)]
    (whole,) = bound.tensors([m.q.weight, m.k.weight, m.v.weight])
    assert is_merged(m, whole)
    m.half()
    assert all(storage.expired() for storage in storages)


def test_deepcopy_and_pickle() -> None:
    m = module()
    whole = merge(m)
    for other in (copy.deepcopy(m), copy.copy(m), pickle.loads(pickle.dumps(m))):
        for name, value in m.state_dict().items():
            assert torch.equal(other.state_dict()[name], value)
    other = copy.deepcopy(m)
    with torch.no_grad():
        other.q.weight.zero_()
        other.k.weight.fill_(2.0)
    assert is_merged(m, whole) and m.q.weight.any() and not torch.equal(other.k.weight, m.k.weight)


def test_torch_save_writes_the_storage_once(tmp_path: Path) -> None:
    def saved(m: nn.Module) -> tuple[int, dict[str, torch.Tensor]]:
        file = io.BytesIO()
        torch.save(m.state_dict(), file)
        size = file.tell()
        file.seek(0)
        return size, torch.load(file)

    m = nn.ModuleDict({name: nn.Linear(256, 256) for name in "qkv"})
    before, _ = saved(m)
    WeightStore(m).merge([[WeightInput(n, m[n]._parameters, "weight") for n in "qkv"]], elements)
    after, loaded = saved(m)
    assert after <= before
    file = io.BytesIO()
    torch.save(m["q"].state_dict(), file)
    assert file.tell() < after / 2  # and no other's rows with it
    assert all(torch.equal(loaded[name], value) for name, value in m.state_dict().items())


def test_safetensors_and_save_pretrained(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    m = LlamaForCausalLM(config)
    attention = m.model.layers[0].self_attn
    want = copy.deepcopy(m.state_dict())
    names = ("q_proj", "k_proj", "v_proj")
    sources = [WeightInput(name, getattr(attention, name)._parameters, "weight") for name in names]
    assert WeightStore(m).merge([sources], elements) != [None]
    m.save_pretrained(tmp_path / "pretrained")
    safetensors.torch.save_model(m, str(tmp_path / "model.safetensors"))
    again = LlamaForCausalLM.from_pretrained(tmp_path / "pretrained")
    assert all(torch.equal(again.state_dict()[name], value) for name, value in want.items())
    again = LlamaForCausalLM(config)
    safetensors.torch.load_model(again, tmp_path / "model.safetensors")
    assert all(torch.equal(again.state_dict()[name], value) for name, value in want.items())


MEMORY = """
import ctypes, gc
import torch
from torch import nn
from onegraph.ir.graph import WeightInput
from onegraph.weights import WeightStore

def resident(field="VmRSS"):
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    (line,) = [line for line in open("/proc/self/status") if line.startswith(field)]
    return int(line.split()[1]) // 1024

m = nn.ModuleList([nn.ModuleDict({n: nn.Linear(1024, 1024, bias=False) for n in "qkv"}) for _ in range(9)])  # 108 MB
groups = [[WeightInput(n, layer[n]._parameters, "weight") for n in "qkv"] for layer in m]
WeightStore(nn.Linear(8, 8)).survey(lambda size: size)
at_rest = resident()
open("/proc/self/clear_refs", "w").write("5")  # the peak begins here
store = WeightStore(m)
bound = store.merge(groups, lambda size: size)
merged, peak = resident(), resident("VmHWM")
storages = {p.untyped_storage()._cdata: p.untyped_storage().nbytes() for p in m.parameters()}
assert sum(whole.nbytes for whole in bound) == sum(storages.values())
for p in m.parameters():
    p.data = p.data.clone()
store.merge(groups, lambda size: size, again=True)
again = resident()
print(at_rest, merged, peak, again, sum(storages.values()), len(storages))
"""


def test_the_model_is_in_memory_once() -> None:
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    at_rest, merged, peak, again, num_bytes, num_storages = map(int, done.stdout.split())
    assert num_bytes == 27 * 4 << 20 and num_storages == 27
    assert abs(merged - at_rest) <= 4 and abs(again - at_rest) <= 4  # of 108 MB
    assert peak - at_rest <= 12 + 4


def test_what_one_graph_merges_again_the_other_finds() -> None:
    m = module()
    store = WeightStore(m)

    def weights() -> Sequence[torch.Tensor]:
        return [one.holder[one.key] for one in inputs(m)]

    first, second = (BoundGroups(store, inputs(m), [(0, 1, 2)], elements) for _ in range(2))
    assert first.tensors(weights())[0].data_ptr() == second.tensors(weights())[0].data_ptr()
    m.k.weight = nn.Parameter(torch.ones(4, 8))
    with counters.expect(weights_merged_again=3):
        (whole,) = first.tensors(weights())
        assert second.tensors(weights())[0].data_ptr() == whole.data_ptr()
    assert torch.equal(whole, torch.cat(list(weights())))


def test_what_can_t_be_merged_any_more_is_copied_on_each_call(caplog: pytest.LogCaptureFixture) -> None:
    m = module()
    bound = BoundGroups(WeightStore(m), inputs(m), [(0, 1, 2)], elements)
    m.k.weight.data = m.q.weight.data[:4]
    weights = [one.holder[one.key] for one in inputs(m)]
    with counters.expect(weights_not_merged=2):
        for value in (1.0, 2.0):
            with torch.no_grad():
                m.q.weight.fill_(value)
            assert torch.equal(bound.tensors(weights)[0], torch.cat(weights))
    assert sum("can't be merged" in record.message for record in caplog.records) == 1
    m.k.weight.data = torch.zeros(4, 8)
    bound.tensors(weights)
    with counters.expect(weights_not_merged=0):
        assert bound.tensors(weights)[0].data_ptr() == m.q.weight.data_ptr()
