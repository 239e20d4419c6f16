"""BuildCall: what a build is made of, and what every build has in common, from the index or traced."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from onegraph.binding import BoundWeights
from onegraph.built import Built
from onegraph.capture.state_check import changed_entries, state_check
from onegraph.config.compilation import CompilationConfig, CUDAGraphMode
from onegraph.config.resolve import ResolvedConfig
from onegraph.cudagraph.recordings import Recordings
from onegraph.ir.ledger import CheckedWhen, StateRead
from onegraph.ir.recording import Recorder
from onegraph.ir.target import Target
from onegraph.store.store import Store
from onegraph.timeline import timeline
from onegraph.weights import WeightStore


class Observer(Protocol):
    """Told when a stage begins, gets on and ends, for progress bars.

    `seconds` is None until the end; `detail` is how far it is, such as `2 of 3 pieces`.
    """

    def __call__(self, stage: str, seconds: float | None, detail: str = "") -> None: ...


@dataclass
class Stages:
    """The stages that ran, with their seconds, in order."""

    observer: Observer | None = None
    done: list[tuple[str, float]] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        if self.observer is not None:
            self.observer(name, None)
        with timeline.stage(name):
            yield
        seconds = time.perf_counter() - started
        self.done.append((name, seconds))
        if self.observer is not None:
            self.observer(name, seconds)

    def progress(self, name: str, done: int, total: int) -> None:
        """Tells that a stage has done so many pieces."""
        if self.observer is not None:
            self.observer(name, None, f"{done} of {total} pieces")

    def totals(self) -> tuple[tuple[str, float], ...]:
        """Each stage once, with its seconds over all regions."""
        names = dict.fromkeys(name for name, _ in self.done)
        return tuple((name, sum(seconds for done, seconds in self.done if done == name)) for name in names)


@dataclass(frozen=True)
class SavedBuild:
    """A file that `save` wrote, and the factors under which its build is in the index.

    `weights` are names and facts of the tensors that its graph takes.
    """

    file: str
    factors: Mapping[str, Any]
    weights: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class BuildCall:
    """A module and one call of it, with all that decides what is made of them.

    `state_checked` is when the result's `holds` will be called, for `explain`. `owned` has the weights that may be
    merged, None if none may be. `store` None means that nothing is read or written. `fuel` is the number of rewrites
    after which passes stop; `pass_observer` is told each piece's graph before the passes, and after each that rewrote
    it; `made_observer` is told all that was made, a list with a `specialised.Specialised` for each region, which stays
    what runs when a piece falls back.
    """

    module: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    name: str
    dynamic_shapes: Any
    config: ResolvedConfig
    target: Target
    store: Store | None
    stages: Stages = field(default_factory=Stages)
    given: CompilationConfig = field(default_factory=CompilationConfig)
    """The configuration as the user gave it."""
    saved: SavedBuild | None = None
    """The build that was asked for, from a file: another one is an error."""
    state_checked: CheckedWhen = "call"
    owned: WeightStore | None = None
    fuel: int | None = None
    pass_observer: Callable[..., None] | None = None
    made_observer: Callable[[Sequence[Any]], None] | None = None

    def recorder(self) -> Recorder | None:
        """What records calls; None where nothing shall be recorded."""
        is_off = self.config.cudagraph_mode is CUDAGraphMode.NONE
        if is_off or not self.target.runs:
            return None
        return self.target.recorder(checks_liveness=self.config.cudagraph_check == "always")

    def told_of_weights(self, recordings: Recordings | None) -> Callable[[int], None] | None:
        """What hears of looks at the weights; None where the module's owner doesn't say when they may have moved."""
        if self.state_checked != "event" or self.config.freeze:
            return None
        return (lambda look: None) if recordings is None else recordings.weights_are_of

    def with_checks(self, built: Built, reads: Iterable[StateRead], weights: Sequence[BoundWeights]) -> Built:
        """The build with the check of Python's state, unless the user promised that nothing changes."""
        if self.config.freeze:
            return built
        state = {(read.expression, read.condition): read for read in reads if read.entry.checked == "call"}
        checked = tuple(state.values())  # regions share most
        return replace(
            built,
            holds=state_check(checked, lambda: all(one.fit() for one in weights)),
            changes=lambda: changed_entries(checked) + tuple(change for one in weights for change in one.changes()),
        )
