"""Dynamo's guards as data: what each one reads, which kind of check it is, and where the user's code read it.

Takes the guards of one trace. Gives a GuardFact for each, and the names that their expressions use; nothing is
installed anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch._dynamo.guards as dynamo_guards

from onegraph.ir.traced import GuardFact
from onegraph.torch_compat.shapes import is_torch_file


def guard_facts(guards: Any) -> Iterator[GuardFact]:
    """The guards of an `OutputGraph.guards`, in a stable order, each fact once."""
    facts: dict[tuple[str, str, str], GuardFact] = {}
    for guard in sorted(guards, key=lambda guard: guard.sort_key()):
        keywords = dict(getattr(guard.create_fn, "keywords", None) or {})
        keywords.pop("recompile_hint", None)
        keywords.pop("value", None)  # a weak reference to the example tensor
        keywords.pop("source_b", None)  # another place of the object; `identity` tells all of them
        name = guard.name
        if guard.create_fn_name() == "HASATTR" and "attr" not in keywords:
            name, keywords["attr"] = _asked_attribute(guard.originating_source)
        frames = list(guard.user_stack or ())
        frame = next((f for f in reversed(frames) if not is_torch_file(f.filename)), frames[-1] if frames else None)
        user = f"{frame.filename}:{frame.lineno}" if frame is not None else None
        identity = (name, guard.create_fn_name(), repr(sorted(keywords.items())))
        if identity not in facts or facts[identity].user is None:
            facts[identity] = GuardFact(name, guard.create_fn_name(), user, keywords)
    return iter(facts.values())


def _asked_attribute(source: Any) -> tuple[str, str]:
    """The object and the attribute of a HASATTR guard of torch 2.11, which stands at the attribute's own place."""
    while not hasattr(source, "member"):
        source = source.base
    return source.base.name, source.member


def expression_scope() -> dict[str, Any]:
    """The functions that guard expressions may call, such as `___dict_keys`, by name."""
    closure_vars = getattr(dynamo_guards, "_get_closure_vars", None)
    return dict(closure_vars()) if closure_vars is not None else dict(dynamo_guards.CLOSURE_VARS)
