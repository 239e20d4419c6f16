"""The property of capture: a compiled call equals eager, or is refused for a reason that the model gives.

Each case is a drawn program (see drawn_models.py), made twice with globals and closures of its own: one copy is
compiled, the other runs eagerly. Both see the same arguments, random streams, and changes of their world between
calls. A value, an aliasing or a state that differs, an error that no construct of the case allows, an error that
isn't onegraph's, a size out of range that is answered: each fails, with the smallest program that still does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import random
import sys
import types
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import onegraph
import onegraph.capture.capture
import onegraph.capture.captured_call
import onegraph.pipeline
from onegraph.binding import BoundWeights
from onegraph.capture.contract import Contract
from onegraph.errors import OnegraphError
from onegraph.torch_compat import dynamo
from tests.compiled_parts import EAGERS_BITS
from tests.pipeline.drawn_models import CONSTRUCTS, Case, draw_case

NUM_CASES, NUM_INDUCTOR_CASES = 300, 20
MIN_HITS = 10
MAX_TOLD = 5
"""So many failures are told by their smallest programs, which takes time."""
CONTEXTS = {f"torch.{make.__name__}()": make for make in (torch.enable_grad, torch.no_grad, torch.inference_mode)}


class PropertyError(AssertionError):
    """The property doesn't hold. `kind` says in what way: value, aliasing, state, error, foreign or range."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind


@dataclasses.dataclass
class Outcome:
    """What happened in one case: calls that equalled eager, those after a change, and the errors' names."""

    equal: int = 0
    equal_after_change: int = 0
    refused: list[str] = dataclasses.field(default_factory=list)


# ---- the two worlds


@contextmanager
def process_state() -> Iterator[None]:
    """Whatever a drawn program changes in the process is put back."""
    variables, default = dict(os.environ), torch.get_default_dtype()
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.set_autocast_cache_enabled(False)  # eager would use casts of weights that were changed since
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's words on the drawn programs aren't what is tested
            yield
    finally:
        for name in set(os.environ) - set(variables):
            del os.environ[name]
        os.environ.update(variables)
        torch.set_default_dtype(default)
        torch.use_deterministic_algorithms(deterministic)
        torch.set_autocast_enabled("cpu", False)
        torch.set_autocast_cache_enabled(True)


@contextmanager
def worlds(case: Case, folder: Path) -> Iterator[list[types.ModuleType]]:
    """The program of the case twice: to be compiled, and to run eagerly."""
    path = folder / f"drawn_{case.seed}_{len(list(folder.iterdir()))}.py"
    path.write_text(case.source())
    made = []
    try:
        for role in ("compiled", "eager"):
            spec = importlib.util.spec_from_file_location(f"{path.stem}_{role}", path)
            assert spec is not None and spec.loader is not None
            world = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = world
            made.append(world)
            spec.loader.exec_module(world)
        yield made
    finally:
        for world in made:
            sys.modules.pop(world.__name__, None)


def world_state(world: Any) -> dict[str, Any]:
    """The model's tensors and plain attributes, and the plain globals that belong to parts, as copies."""
    found: dict[str, Any] = {}
    for path, module in world.model.named_modules():
        found |= {f"{path}.{name}": plain(value) for name, value in vars(module).items() if not name.startswith("_")}
        tensors = {**module._parameters, **module._buffers}
        found |= {f"{path}.{name}": plain(value) for name, value in tensors.items()}
    found |= {name: plain(value) for name, value in vars(world).items() if is_of_a_part(name)}
    return {name: value for name, value in found.items() if value is not NotImplemented}


def is_of_a_part(name: str) -> bool:
    """Whether a global belongs to a part; Dynamo leaves globals of its own, with underscores in front."""
    return name[-1].isdigit() and not name.startswith("_")


def plain(value: Any) -> Any:
    """A copy of a value that can be compared; NotImplemented for functions, classes and other objects."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else NotImplemented


def compare(kind: str, got: Any, expected: Any, path: str, exact: bool) -> None:
    """Types, structure and values, -0.0 and NaN as themselves; within Inductor's rounding unless `exact`."""

    def differs(why: str) -> PropertyError:
        return PropertyError(kind, f"{path}: {why}: {got!r:.300} instead of {expected!r:.300}")

    if type(got).__qualname__ != type(expected).__qualname__ and not isinstance(got, torch.Tensor):
        raise differs("another type")
    if isinstance(expected, torch.Tensor):
        if not isinstance(got, torch.Tensor) or got.dtype != expected.dtype or got.shape != expected.shape:
            raise differs("another tensor")
        tolerance = {"rtol": 1e-5, "atol": 1e-6} if exact else {"rtol": 2e-3, "atol": 1e-3}
        if expected.dtype == torch.bfloat16:
            tolerance = {"rtol": 2e-2, "atol": 2e-2}
        try:
            torch.testing.assert_close(got.detach(), expected.detach(), equal_nan=True, **tolerance)
        except AssertionError as error:
            raise differs(str(error).partition("\n")[0]) from None
    elif dataclasses.is_dataclass(expected):
        compare(kind, vars(got), vars(expected), path, exact)
    elif isinstance(expected, dict):
        if list(got) != list(expected):
            raise differs("other keys")
        for key in expected:
            compare(kind, got[key], expected[key], f"{path}[{key!r}]", exact)
    elif isinstance(expected, list | tuple):
        if len(got) != len(expected):
            raise differs("another length")
        for index, item in enumerate(expected):
            compare(kind, got[index], item, f"{path}[{index}]", exact)
    elif isinstance(expected, float):
        if repr(got) != repr(expected):  # NaN is itself, and -0.0 isn't 0.0
            raise differs("another number")
    elif got != expected:
        raise differs("another value")


def sharing(*values: Any) -> list[int]:
    """Which tensors share memory, as the index of the first one with the same storage. Empty ones have none."""
    found = [tensor for tensor in tensors_in(values) if tensor.numel()]
    storages = [tensor.untyped_storage()._cdata for tensor in found]
    return [storages.index(storage) for storage in storages]


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from tensors_in(vars(value))
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


# ---- the property


def run_case(case: Case, folder: Path, backend: str, **config: Any) -> Outcome:
    """Runs all calls of the case; raises PropertyError where a call is neither right nor refused rightly."""
    outcome = Outcome()
    with process_state(), worlds(case, folder) as (subject, reference):
        compiled = onegraph.compile(
            subject.target,
            dynamic_shapes=subject.dynamic_shapes,
            config={"backend": backend, "passes": EAGERS_BITS, **case.options, **config},
        )
        changed = False
        for index, call in enumerate(case.calls):
            changed = changed or bool(call.changes)
            for change in call.changes:
                for world in (subject, reference):
                    # an earlier change may have taken away what this one changes
                    with CONTEXTS[case.context](), contextlib.suppress(IndexError, AttributeError):
                        exec(change, vars(world))
            before = world_state(subject)
            given, expected_given = (world.arguments(call.n, call.m, index) for world in (subject, reference))
            try:
                with CONTEXTS[case.context]():
                    result = invoke(compiled, given, call.positional)
            except OnegraphError as error:
                name = type(error).__name__
                if name not in allowed_errors(case, index, changed, bool(outcome.equal)):
                    raise PropertyError("error", f"call {index}: {name} isn't allowed here: {error}") from error
                compare("state", world_state(subject), before, f"state after the refused call {index}", True)
                outcome.refused.append(name)
                if name in ("ConstraintError", "CaptureError"):
                    return outcome  # what can't be built now can't be built for the next call either
                continue
            except Exception as error:
                if raised_by_eager(reference, expected_given, call.positional) == type(error).__name__:
                    return outcome
                raise PropertyError("foreign", f"call {index}: {type(error).__name__}: {error}") from error
            if not case.in_range(call):
                raise PropertyError("range", f"call {index} has a size outside its range, and was answered")
            try:
                with CONTEXTS[case.context](), torch.no_grad():  # compiled means: without gradients
                    expected = invoke(reference.target, expected_given, call.positional)
            except Exception as error:
                raise PropertyError("value", f"call {index}: eager raises {error}, compiled gives a value") from error
            exact = backend != "inductor"
            compare("value", result, expected, f"result of call {index}", exact)
            compare("state", given, expected_given, f"arguments after call {index}", exact)
            compare("state", world_state(subject), world_state(reference), f"state after call {index}", exact)
            got, wanted = (
                sharing(values, arguments, world.model.state_dict())
                for values, arguments, world in ((result, given, subject), (expected, expected_given, reference))
            )
            if got != wanted:
                raise PropertyError("aliasing", f"call {index}: tensors share memory as {got} instead of {wanted}")
            outcome.equal += 1
            outcome.equal_after_change += changed
    return outcome


def invoke(target: Callable[..., Any], arguments: dict[str, Any], positional: bool) -> Any:
    torch.manual_seed(7)
    random.seed(7)
    if positional:
        return target(arguments["x"], **{name: value for name, value in arguments.items() if name != "x"})
    return target(**arguments)


def raised_by_eager(reference: Any, given: Any, positional: Any) -> str | None:
    """The name of the error that the same call raises without a compiler."""
    try:
        with torch.no_grad():
            invoke(reference.target, given, positional)
    except Exception as error:
        return type(error).__name__
    return None


def allowed_errors(case: Case, index: int, changed: bool, built: bool) -> set[str]:
    """The names of the errors with which this call may be refused."""
    allowed = {name for _, part in case.parts for name in part.allowed}
    if not case.in_range(case.calls[index]):
        allowed |= {"ShapeOutOfRangeError"} | (set() if built else {"ConfigError"})
    if changed and case.options.get("on_state_change") == "error":
        allowed.add("StateChangedError")
    if case.decorator and case.kind != "function" and len({call.positional for call in case.calls[: index + 1]}) > 1:
        allowed.add("InputContractError")  # the decorator sees whether x is given by position
    if {"on_constraint", "dynamic_shapes"} & case.options.keys():
        allowed.add("CaptureError")  # these trace at sizes where eager may fail too, such as a maximum of no rows
    return allowed


def smallest(case: Case, fails: Callable[[Case], bool]) -> Case:
    """Takes away parts, calls, changes and options one by one, as long as the case still fails."""

    def smaller(case: Case) -> Iterator[Case]:
        for skip in range(len(case.parts)):
            number = case.parts[skip][0]
            rest = tuple(pair for pair in case.parts if pair[0] != number)
            calls = tuple(
                dataclasses.replace(call, changes=tuple(c for c in call.changes if f"_{number}" not in c and "_" in c))
                for call in case.calls
            )
            yield dataclasses.replace(case, parts=rest, calls=calls)
        for skip, call in enumerate(case.calls):
            yield dataclasses.replace(case, calls=case.calls[:skip] + case.calls[skip + 1 :])
            for drop in range(len(call.changes)):
                fewer = dataclasses.replace(call, changes=call.changes[:drop] + call.changes[drop + 1 :])
                yield dataclasses.replace(case, calls=(*case.calls[:skip], fewer, *case.calls[skip + 1 :]))
        for name in case.options:
            yield dataclasses.replace(case, options={k: v for k, v in case.options.items() if k != name})
        for plainer in ({"kind": "module"}, {"result": "dict"}, {"context": "torch.enable_grad()"}):
            if any(getattr(case, name) != value for name, value in plainer.items()):
                yield dataclasses.replace(case, **plainer)

    while True:
        found = next((candidate for candidate in smaller(case) if candidate.calls and fails(candidate)), None)
        if found is None:
            return case
        case = found


def checked(case: Case, folder: Path, backend: str, **config: Any) -> Outcome:
    """run_case, with a failure told by its smallest program; without a compiler where it fails so too."""

    def failure(candidate: Case, backend: str) -> PropertyError | None:
        try:
            run_case(candidate, folder, backend, **config)
        except PropertyError as error:
            return error
        return None

    try:
        return run_case(case, folder, backend, **config)
    except PropertyError as error:
        kind = error.kind

    def fails(candidate: Case, backend: str) -> bool:
        found = failure(candidate, backend)
        return found is not None and found.kind == kind

    simplest = "eager" if fails(case, "eager") else backend
    least = smallest(case, lambda candidate: fails(candidate, simplest))
    raise PropertyError(kind, f"seed {case.seed}, {failure(least, simplest)}\n\n{least.program(simplest)}")


# ---- the counts


class Counts:
    """What became of the cases, by construct."""

    def __init__(self) -> None:
        self.rows: dict[str, Counter[str]] = defaultdict(Counter)
        self.failures: list[str] = []

    def run(self, cases: Iterator[tuple[Case, str]], folder: Path) -> None:
        for case, backend in cases:
            try:
                self.add(case, (checked if len(self.failures) < MAX_TOLD else run_case)(case, folder, backend))
            except PropertyError as error:
                self.failures.append(f"seed {case.seed}, {error}" if len(self.failures) >= MAX_TOLD else str(error))

    def add(self, case: Case, outcome: Outcome) -> None:
        """A construct is hit by a case with an equal call, or with an error that this construct allows."""
        for name in case.constructs:
            row = self.rows[name]
            own = {error for _, part in case.parts if part.construct == name for error in part.allowed}
            changes = any(part.changes for _, part in case.parts if part.construct == name)
            refused = [error for error in outcome.refused if error in own or (changes and error == "StateChangedError")]
            row["cases"] += 1
            row["hit"] += bool(outcome.equal or refused)
            row["equal calls"] += outcome.equal
            row["changes"] += changes * sum(len(call.changes) for call in case.calls)
            row["equal after a change"] += outcome.equal_after_change if changes else 0
            row.update(refused)

    def __str__(self) -> str:
        columns = ["cases", "hit", "equal calls", "changes", "equal after a change"]
        columns += sorted({column for row in self.rows.values() for column in row} - set(columns))
        lines = ["construct            " + "  ".join(columns)]
        for name, row in sorted(self.rows.items()):
            lines.append(f"{name:<20} " + "  ".join(f"{row[column]:>{len(column)}}" for column in columns))
        return "\n".join(lines)

    def verdict(self, min_hits: int) -> None:
        assert not self.failures, f"{len(self.failures)} cases fail:\n" + "\n\n".join(self.failures)
        seldom = {name: self.rows[name]["hit"] for name in CONSTRUCTS if self.rows[name]["hit"] < min_hits}
        assert not seldom, f"constructs that were hit fewer than {min_hits} times: {seldom}\n{self}"
        vacuous = [name for name, row in self.rows.items() if row["changes"] and not row["equal after a change"]]
        assert not vacuous or not min_hits, f"constructs that are never right after a change: {vacuous}\n{self}"


def plain_cases(start: int, count: int) -> Iterator[tuple[Case, str]]:
    for seed in range(start, start + count):
        yield draw_case(seed), "aot_eager" if seed % 3 == 0 else "eager"


def inductor_cases(start: int, count: int) -> Iterator[tuple[Case, str]]:
    """Small ones: each recapture is a compile of half a minute."""
    for seed in range(start, start + count):
        case = draw_case(seed, max_parts=2, max_changes=1)
        yield dataclasses.replace(case, calls=case.calls[:3]), "inductor"


@pytest.fixture
def counts() -> Counts:
    return Counts()


def test_every_construct_equals_eager_or_is_refused(counts: Counts, tmp_path: Path) -> None:
    assert len(CONSTRUCTS) >= 12
    counts.run(plain_cases(0, NUM_CASES), tmp_path)
    print(counts)
    counts.verdict(MIN_HITS)


def test_inductor_equals_eager_or_is_refused(counts: Counts, tmp_path: Path) -> None:
    counts.run(inductor_cases(50_000, NUM_INDUCTOR_CASES), tmp_path)
    print(counts)
    assert sum(row["equal calls"] for row in counts.rows.values()) >= NUM_INDUCTOR_CASES
    counts.verdict(0)


@pytest.mark.full
@pytest.mark.timeout(7200)
def test_ten_times_as_many_cases(counts: Counts, tmp_path: Path) -> None:
    """Other seeds than the short run's. The counts are written beside this file, to be committed."""
    counts.run(plain_cases(10_000, 10 * NUM_CASES), tmp_path)
    write_log("eager", f"eager and aot_eager, {10 * NUM_CASES} cases", counts)
    counts.verdict(10 * MIN_HITS)


@pytest.mark.full
@pytest.mark.timeout(7200)
def test_ten_times_as_many_cases_with_inductor(counts: Counts, tmp_path: Path) -> None:
    counts.run(inductor_cases(60_000, 10 * NUM_INDUCTOR_CASES), tmp_path)
    write_log("inductor", f"inductor, {10 * NUM_INDUCTOR_CASES} cases", counts)
    counts.verdict(0)


def write_log(name: str, cases: str, counts: Counts) -> None:
    """The log of a long run, before its verdict."""
    failures = "".join(f"\n{failure}\n" for failure in counts.failures)
    Path(__file__).with_name(f"capture_property_full_{name}.log").write_text(
        f"torch {torch.__version__}, {len(CONSTRUCTS)} constructs\n\n"
        f"{cases}, {len(counts.failures)} failed\n{counts}\n{failures}"
    )


# ---- unsound builds: the property must see what it is there to see


def caught(
    constructs: list[str], break_build: Callable[[pytest.MonkeyPatch], None], folder: Path, **config: Any
) -> None:
    """Asserts that some case of one construct gives a wrong value in the broken build, and is right in a sound one."""
    others: Counter[str] = Counter()
    for seed in range(40):
        case = draw_case(seed, first=constructs[seed % len(constructs)], max_parts=1)
        case = dataclasses.replace(case, options={})
        try:
            with pytest.MonkeyPatch.context() as patch:
                break_build(patch)
                run_case(case, folder, "eager", **config)
        except PropertyError as error:
            if error.kind == "value":
                run_case(case, folder, "eager")
                return
            others[error.kind] += 1
    pytest.fail(f"no wrong value in 40 cases of an unsound build; other failures: {dict(others)}")


def test_a_build_without_constraints_is_caught(tmp_path: Path) -> None:
    """What other stacks do: sizes traced with the first call's value, and the guards on them dropped."""

    def break_build(patch: pytest.MonkeyPatch) -> None:
        def mark(tensor: torch.Tensor, dim: int, **kwargs: Any) -> None:
            torch._dynamo.maybe_mark_dynamic(tensor, dim)

        patch.setattr(dynamo, "mark_dynamic_dim", mark)
        for module in (onegraph.capture.capture, onegraph.pipeline):
            patch.setattr(module, "refuse_narrowing", lambda *args, **kwargs: None)

    caught(["branch_on_size", "divisibility_branch"], break_build, tmp_path)


def test_a_build_without_state_checks_is_caught(tmp_path: Path) -> None:
    """`freeze` is the promise that nothing changes, which the drawn changes break."""
    stateful = ["attribute_read", "global_state", "closure_cell", "signed_constants"]
    caught(stateful, lambda patch: None, tmp_path, freeze=True)


def test_a_build_without_the_input_contract_is_caught(tmp_path: Path) -> None:
    original = onegraph.capture.captured_call.input_contract

    def unchecked(*args: Any, **kwargs: Any) -> Contract:
        return dataclasses.replace(original(*args, **kwargs), bind=lambda calls: calls[0][1])

    caught(
        ["optional_argument"],
        lambda patch: patch.setattr(onegraph.capture.captured_call, "input_contract", unchecked),
        tmp_path,
    )


def test_a_build_that_binds_its_weights_once_is_caught(tmp_path: Path) -> None:
    original = onegraph.pipeline.bind_weights

    def bind_once(call: Any, graph_weights: Any, *args: Any, **how: Any) -> BoundWeights:
        weights = [weight.holder[weight.key].detach().clone() for weight in graph_weights]
        run = torch.no_grad()(lambda *inputs: call(*weights, *inputs))
        return dataclasses.replace(original(call, graph_weights, *args, **how), run=run, fit=lambda: True)

    caught(["replaced_weights"], lambda patch: patch.setattr(onegraph.pipeline, "bind_weights", bind_once), tmp_path)
