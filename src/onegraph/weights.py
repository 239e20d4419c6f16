"""WeightStore: merged weights in one block of memory, in which the module's own tensors lie. Nothing is held twice.

Takes a module that we own, whose tensors are re-pointed by `tensor.data =`: a Parameter stays the object that it is,
and whatever holds it keeps it. What is changed in place is therefore changed in both. A source that was replaced
(another Parameter, `.data =`, `module.to`) no longer lies where it lay, which the bound weights see at the next call;
then they are merged again. As with `.data =`, nothing else may run the module meanwhile.

Only the sources own the memory, so that it is freed when they are re-pointed; a merged weight is an address and a
shape, and right while the sources lie there. Each source has a storage of its own, a slice of the block: to
torch.save and safetensors a storage that several parameters share would be one that is written several times, or
that can't be written.
"""

from __future__ import annotations

import functools
import itertools
import operator
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from onegraph.counters import counters
from onegraph.ir.graph import WeightInput
from onegraph.log import get_logger
from onegraph.torch_compat.raw_tensors import storage_span, tensor_at

log = get_logger(__name__)

Alignment = Callable[[int], int]
"""Bytes of an element -> the alignment in bytes that compiled code needs."""
_data_ptr = torch.Tensor.data_ptr


class WeightStore:
    """What is merged of one module's weights, by all of its graphs.

    `version` grows whenever weights may have begun to lie elsewhere.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self._merged: frozenset[tuple[int, ...]] = frozenset()
        """Tensors by their ids: weak references would have torch.utils.swap_tensors refuse them."""
        self._merging = threading.Lock()
        self._told: set[str] = set()
        self.version = 0

    def survey(self, required_alignment: Alignment) -> Survey:
        """How the module's tensors lie now, to ask about several groups."""
        return Survey(self._module, required_alignment, self._merged)

    def merge(
        self, groups: Sequence[Sequence[WeightInput]], required_alignment: Alignment, again: bool = False
    ) -> list[torch.Tensor | None]:
        """The merged weight of each group, over the memory of its sources: it doesn't own it.

        Those that lie right already aren't copied. None where weights can't be merged, which is told once. `again` is
        for groups that were merged before.
        """
        with self._merging:
            self.version += 1
            survey = self.survey(required_alignment)
            merged = [self._merge_one(sources, survey, again) for sources in groups]
            ids = (tuple(id(_standing(source)) for source in sources) for sources in groups)
            self._merged = survey.lying_merged.union(
                one for one, whole in zip(ids, merged, strict=True) if whole is not None
            )
            return merged

    def _merge_one(self, sources: Sequence[WeightInput], survey: Survey, again: bool) -> torch.Tensor | None:
        why = survey.why_not(sources)
        if why is not None:
            self._tell(why, "weights are copied on each call, since they can't be merged: %s", why)
            counters.add("weights_not_merged")
            return None
        tensors = list(map(_standing, sources))
        if not _lie_joined(tensors):
            _move_together(tensors)
            counters.add("weights_merged_again" if again else "weights_merged", len(tensors))
            if again:
                names = ", ".join(source.name for source in sources)
                self._tell("again", "merged again, since they were replaced: %s, and maybe others", names)
        with torch.inference_mode(False), torch.no_grad():
            return tensor_at(tensors[0].data_ptr(), _joined_shape(tensors), tensors[0])

    def _tell(self, once: str, text: str, what: str) -> None:
        if once not in self._told:
            self._told.add(once)
            log.warning(text, what)


class BoundGroups:
    """The merged weights of one graph, as its calls take them. `indices` are those of each group's sources."""

    def __init__(
        self,
        store: WeightStore,
        weights: Sequence[WeightInput],
        indices: Sequence[Sequence[int]],
        required_alignment: Alignment,
    ) -> None:
        apart = dict.fromkeys(map(tuple, indices))
        assert sum(map(len, apart)) == len(set().union(*apart)), "a weight in two merged weights"
        self._store = store
        self._alignment = required_alignment
        self._indices = indices
        self._pick = operator.itemgetter(*(index for one in indices for index in one))
        self._groups = [[weights[index] for index in one] for one in indices]
        self._known: tuple[list[int], list[Any]] = ([], [])
        self._merge([source.holder[source.key] for source in weights], again=False)

    @property
    def version(self) -> int:
        """Another one means that weights may lie in other storages than before."""
        return self._store.version

    def tensors(self, weights: Sequence[torch.Tensor]) -> list[Any]:
        """The merged weights for a call with these weights, which stand in their places now and are of their kinds.

        Where the sources have the addresses and kinds that they had when they were merged, the merged weights show
        their memory: that is all that is asked, and exact.
        """
        pointers, tensors = self._known
        if list(map(_data_ptr, self._pick(weights))) == pointers:
            return tensors
        return self._merge(weights, again=True)

    def _merge(self, weights: Sequence[torch.Tensor], again: bool) -> list[Any]:
        merged = self._store.merge(self._groups, self._alignment, again)
        parts = [[weights[index] for index in indices] for indices in self._indices]
        with torch.no_grad():
            whole = [torch.cat(part) if one is None else one for one, part in zip(merged, parts, strict=True)]
        if all(one is not None for one in merged):
            rows = (one.split(list(map(len, part))) for one, part in zip(whole, parts, strict=True))
            self._known = [one.data_ptr() for split in rows for one in split], whole
        return whole


class Survey:
    """How a module's tensors lie in memory at one moment. It holds them all, so let it go soon.

    `merged` are ids of tensors that were merged.
    """

    def __init__(
        self, module: torch.nn.Module, required_alignment: Alignment, merged: frozenset[tuple[int, ...]]
    ) -> None:
        self._module = module
        self._alignment = required_alignment
        self._merged = merged

    def why_not(self, sources: Sequence[WeightInput]) -> str | None:
        """Why the weights can't be merged in this order, None if they can or are."""
        tensors = [_standing(source) for source in sources]
        for source, tensor in zip(sources, tensors, strict=True):
            why = _why_not_one(tensor)
            if why is not None:
                return f"{source.name} {why}"
        first, at = tensors[0], 0
        alignment = self._alignment(first.element_size())
        for source, tensor in zip(sources, tensors, strict=True):
            if (tensor.dtype, tensor.device, tensor.shape[1:]) != (first.dtype, first.device, first.shape[1:]):
                return f"{source.name} is of another dtype, device or length of rows than {sources[0].name}"
            if at % alignment:
                return f"{source.name} wouldn't lie at a multiple of {alignment} bytes"
            at += tensor.nbytes
        if _lie_joined(tensors):
            aligned = first.data_ptr() % alignment == 0
            return None if aligned else f"{sources[0].name} doesn't lie at a multiple of {alignment} bytes"
        return self._why_not_moved(sources, tensors)

    def _why_not_moved(self, sources: Sequence[WeightInput], tensors: Sequence[torch.Tensor]) -> str | None:
        """Why the tensors can't be re-pointed."""
        ids = tuple(map(id, tensors))
        inside = set(ids)
        if len(inside) < len(tensors):
            return f"{sources[0].name} and those to merge it with are the same tensor in part"
        if any(inside.intersection(group) and not _is_run(group, ids) for group in self.lying_merged):
            return f"{sources[0].name} and those to merge it with are merged already, in another order or with others"
        for source, tensor in zip(sources, tensors, strict=True):
            if id(tensor) not in self._together:
                return f"{source.name} isn't a tensor that the module holds"
            others = [name for key, name in self._together[id(tensor)] if key not in inside]
            if others:
                return f"{source.name} shares memory with {others[0]}"
            if tensor.is_inference():
                return f"{source.name} was made in inference mode"
            if tensor.is_cpu and tensor.is_shared():
                return f"{source.name} lies in memory that is shared with other processes"
        ends = sorted((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in tensors)
        if any(end > start for (_, end), (start, _) in itertools.pairwise(ends)):
            return f"{sources[0].name} and those to merge it with overlap"
        return None

    @functools.cached_property
    def lying_merged(self) -> frozenset[tuple[int, ...]]:
        """Of what was merged, what still is."""
        return frozenset(group for group in self._merged if self._are_merged(group))

    def _are_merged(self, group: tuple[int, ...]) -> bool:
        tensors = [self._held[key][1] for key in group if key in self._held]
        return len(tensors) == len(group) and not any(map(_why_not_one, tensors)) and _lie_joined(tensors)

    @functools.cached_property
    def _held(self) -> dict[int, tuple[str, torch.Tensor]]:
        return {id(tensor): (name, tensor) for name, tensor in held_tensors(self._module)}

    @functools.cached_property
    def _together(self) -> dict[int, list[tuple[int, str]]]:
        """Each tensor, by its id, with all that lie in its storage or one that overlaps it, itself among them."""
        spans = sorted((*span, key) for key, (_, one) in self._held.items() if (span := storage_span(one)) is not None)
        together: dict[int, list[tuple[int, str]]] = {}
        end = 0
        sharing: list[tuple[int, str]] = []
        for start, stop, key in spans:
            if start >= end:
                sharing = []
            sharing.append((key, self._held[key][0]))
            together[key] = sharing
            end = max(end, stop)
        return together


def held_tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors of a module and its submodules with their names: also attributes, and what is in lists and dicts."""
    for path, child in module.named_modules():
        prefix = f"{path}." if path else ""
        for name, value in vars(child).items():
            inner = prefix if name in ("_parameters", "_buffers") else f"{prefix}{name}."
            seen: set[int] = set()
            for key, tensor in _tensors_in(value, seen):
                yield f"{inner}{key}".removesuffix("."), tensor


def _tensors_in(value: Any, seen: set[int]) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield "", value
    elif isinstance(value, dict | list | tuple) and id(value) not in seen:
        seen.add(id(value))
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            for inner, tensor in _tensors_in(item, seen):
                yield f"{key}.{inner}".removesuffix("."), tensor


def _standing(source: WeightInput) -> Any:
    try:
        return source.holder[source.key]
    except (KeyError, ValueError):  # deleted, from a dict or a closure
        return None


def _why_not_one(tensor: Any) -> str | None:
    """Why a tensor can't be a part of a merged one."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return f"is a {type(tensor).__name__}, not a plain tensor"
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_complex() or tensor.is_neg():
        return "isn't laid out as plain rows"
    if tensor.dim() == 0 or tensor.numel() == 0 or tensor.is_meta:
        return "has no rows in memory"
    contiguous = torch.empty(tensor.shape, device="meta").stride()
    return None if tensor.stride() == contiguous else "isn't contiguous"


def _lie_joined(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether contiguous tensors lie one below the other; in which storages doesn't matter."""
    ends = [tensor.data_ptr() + tensor.nbytes for tensor in tensors]
    return ends[:-1] == list(map(_data_ptr, tensors[1:]))


def _joined_shape(tensors: Sequence[torch.Tensor]) -> tuple[int, ...]:
    return (sum(map(len, tensors)), *tensors[0].shape[1:])


def _is_run(inner: Sequence[int], outer: Sequence[int]) -> bool:
    return any(outer[start : start + len(inner)] == inner for start in range(len(outer)))


def _move_together(tensors: Sequence[torch.Tensor]) -> None:
    """Has the tensors lie in one new block of memory, one after the other."""
    first = tensors[0]
    with torch.inference_mode(False), torch.no_grad():
        block = torch.empty(_joined_shape(tensors), dtype=first.dtype, device=first.device).untyped_storage()
        start = 0
        for tensor in tensors:
            own = block[start : start + tensor.nbytes]  # holds the block
            moved = torch.empty(0, dtype=first.dtype, device=first.device).set_(own, 0, tensor.shape)
            moved.copy_(tensor.detach())
            tensor.data = moved
            start += tensor.nbytes
