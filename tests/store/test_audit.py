"""`onegraph cache audit`: what is planted is found, and nothing else; and once from outside."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.export import Dim

import onegraph.audit.audit as audit_module
from onegraph import api, piece_compiler
from onegraph.audit.audit import Report, audit
from onegraph.audit.outcome import Outcome
from onegraph.audit.perturbation import Perturbation
from onegraph.audit.verdict import Judged
from onegraph.audit.witness import Witness
from onegraph.build_call import BuildCall
from onegraph.config.compilation import FIELDS
from onegraph.env import environment
from onegraph.errors import ConfigError
from onegraph.ir.key import Key
from tests.store.test_cache_commands import MODEL_FLAGS, tree
from tests.store.test_cache_commands import onegraph as command

SCALE = 2.0


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(8, 8)
        self.second = torch.nn.Linear(8, 8)
        self.eps = 1e-6
        self.unused = 3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.mm(self.first(x), self.second.weight)
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * SCALE


def every(changes: Sequence[Perturbation]) -> Iterator[Perturbation]:
    yield from changes


def audited(*only: str, **config: Any) -> Report:
    witness = Witness.configured(environment())
    assert isinstance(witness, Witness)
    config = {"backend": "eager", "splitting_ops": ["torch.mm"], **config}
    model = Model().eval().requires_grad_(False)
    compiled = api.compiled_model(
        model,
        dynamic_shapes={"x": {0: Dim("n", max=64)}},
        config=config,
        name=None,
        own_module=False,
        own_weights=False,
        lookup=witness,
    )
    compiled.warm_up(torch.ones(4, 8))
    return audit(witness.call, only, every)


def named(report: Report, name: str) -> list[Judged]:
    return [one for one in report.judged if str(one.perturbation).startswith(name)]


def told(report: Report) -> str:
    return "\n".join(f"{one.verdict:<16} {one.perturbation}: {one.why} | {one.index}" for one in report.judged)


def test_over_all_fields_each_key_says_what_is_compiled(fresh_cache: Path) -> None:
    report = audited("field", "pass", "env", "torch")
    assert report.ok, told(report)
    assert {one.perturbation.name for one in named(report, "field.")} == {f"field.{name}" for name in FIELDS}
    assert not list(fresh_cache.rglob("manifest.json"))


def test_over_captured_values_and_options_of_inductor() -> None:
    report = audited("value", "inductor")
    assert report.ok, told(report)


def with_factors(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Keys are made of what `change(factors)` leaves."""
    original = piece_compiler.piece_key

    def piece_key(*args: Any) -> Any:
        key = original(*args)
        return Key.of(change(dict(key.factors)), key.graph) if isinstance(key, Key) else key

    monkeypatch.setattr(piece_compiler, "piece_key", piece_key)


def without(*names: str) -> Any:
    return lambda factors: {name: value for name, value in factors.items() if name not in names}


def test_a_factor_that_is_left_out_of_keys_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with_factors(monkeypatch, without("torch"))
    report = audited("torch")
    found = {one.perturbation.name: one for one in report.judged if one.verdict == "stale"}
    assert not report.ok and "torch.mkldnn" in found and "control" not in found
    assert "mkldnn is False instead of True" in found["torch.mkldnn"].why
    assert {one.verdict for one in named(report, "torch.num_threads")} == {"fine"}  # of another factor


def test_a_graph_that_is_left_out_of_keys_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with_factors(monkeypatch, without("graph"))
    (scale, _) = audited("value.SCALE").judged
    assert scale.verdict == "stale" and "its graph has" in scale.why


def test_a_factor_that_is_of_no_matter_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    with_factors(monkeypatch, lambda factors: {**factors, "time": next(ticks)})
    report = audited("field.plan_memory")
    assert [one.verdict for one in report.judged] == ["needless", "needless"] and not report.ok


def test_a_check_of_a_trace_that_is_left_out_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from onegraph.capture import state

    read = state.object_read
    monkeypatch.setattr(state, "object_read", lambda fact, *rest: None if rest[-1] == "SCALE" else read(fact, *rest))
    assert "SCALE" not in told(audited("value"))  # it isn't known to be a captured value
    monkeypatch.undo()
    from onegraph.capture import trace_record

    monkeypatch.setattr(trace_record, "_compare", lambda now, then: None)
    (scale, control) = audited("value.SCALE").judged
    assert scale.verdict == "unseen" and "a warm start would take" in scale.why and control.verdict == "fine"


def test_a_wrong_declaration_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    info = FIELDS["inductor_compile_config"]
    monkeypatch.setitem(FIELDS, "inductor_compile_config", type(info)(info.kind, "nothing", info.doc))  # type: ignore[arg-type]
    (one, _) = audited("field.inductor_compile_config").judged
    assert one.verdict == "wrong prediction" and one.why == "declared to affect nothing, and settings changed"


def test_a_value_with_which_the_model_does_not_run_is_refused_and_put_back() -> None:
    report = audited("field.splitting_ops", splitting_ops=["torch.mm", "torch.rsqrt"], eager_pieces=[3])
    whole, fewer, control = report.judged
    assert whole.verdict == "refused" and "eager_pieces has 3" in whole.why and control.verdict == "fine"
    assert fewer.verdict in ("fine", "refused")


def test_a_setting_that_ends_in_an_error_of_another_kind_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    build = audit_module.outcome

    def outcome(call: BuildCall) -> Outcome:
        if not call.config.plan_memory:
            raise RuntimeError("out of memory")
        return build(call)

    monkeypatch.setattr(audit_module, "outcome", outcome)
    report = audited("field.plan_memory")
    assert not report.ok
    assert (report.judged[0].verdict, report.judged[0].why) == ("broken", "RuntimeError: out of memory")


def test_from_outside(fresh_cache: Path) -> None:
    words = ("cache", "audit", *MODEL_FLAGS, "--only", "field.backend", "field.cudagraph_check", "torch.deterministic")
    told = command(fresh_cache, *words, "--all")
    assert "fine              torch.deterministic=True: settings changed, 3 new keys; index: another key" in told
    assert "refused           field.cudagraph_check=always:" in told and told.endswith("all good\n")
    assert "builtin, backend=inductor: 5 compiled pieces" in told and not tree(fresh_cache)


def test_bad_usage(tmp_path: Path) -> None:
    assert "there is no flag --olny" in command(tmp_path, "cache", "audit", "--olny", "field", code=2)
    report = json.loads(command(tmp_path, "cache", "audit", "--json", "--only", "env.OMP_NUM_THREADS", *MODEL_FLAGS))
    assert report["ok"] and [one["name"] for one in report["changes"]] == ["env.OMP_NUM_THREADS", "control"]


def test_a_change_that_there_is_not_is_refused() -> None:
    for name, hint in (("field.backends", "did you mean 'field.backend'"), ("nothing at all", "no change")):
        with pytest.raises(ConfigError, match=hint):
            audited(name)
