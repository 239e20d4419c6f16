"""CompiledModel: the result of onegraph.compile. It is called like the module, and explains itself.

The first call (or `warm_up`) captures and compiles through the pipeline; every later call runs the entry that
the pipeline made: input checks, the traced function's residual code, the pieces. No Dynamo runs after that.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from onegraph.errors import ConfigError
from onegraph.explanation import Explanation


@dataclass(frozen=True)
class Built:
    """What a build gives: `entry` takes the module's own arguments; `explanation` tells how it came about."""

    entry: Callable[..., Any]
    explanation: Explanation


class CompiledModel:
    """A compiled module or function.

    `original` is the module or function itself, unchanged. `build(args, kwargs)` makes the entry; it is called
    once, by the first call or by `warm_up`, in the caller's thread. Any number of threads may call.
    """

    def __init__(
        self,
        original: Any,
        build: Callable[[tuple[Any, ...], dict[str, Any]], Built],
        unbuilt: Callable[[], Explanation],
    ) -> None:
        self.original = original
        self._build = build
        self._unbuilt = unbuilt
        self._built: Built | None = None
        self._building = threading.RLock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the compiled module; gives what the module itself would give, with its type and structure.

        Raises ShapeOutOfRangeError for a size outside its declared range, InputContractError for another
        dtype, device, rank, layout or constant than the captured one; on the first call also what compiling
        raises (ConfigError, CaptureError, ConstraintError, CompileError).
        """
        built = self._built
        if built is None:
            built = self._ensure_built(args, kwargs)
        return built.entry(*args, **kwargs)

    def warm_up(self, example: Mapping[str, Any] | None = None, /, *args: Any, **kwargs: Any) -> None:
        """Captures and compiles ahead of traffic, without running the module.

        `example` maps argument names to example values; their sizes don't matter within the declared ranges.
        """
        if example is not None and not isinstance(example, Mapping):
            args = (example, *args)
        elif example is not None:
            kwargs = {**example, **kwargs}
        self._ensure_built(args, kwargs)

    def explain(self) -> Explanation:
        """How this model was compiled; before the first call, what is configured."""
        return self._unbuilt() if self._built is None else self._built.explanation

    def _ensure_built(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Built:
        with self._building:
            if self._built is None:
                self._built = self._build(args, kwargs)
            return self._built

    def __getattr__(self, name: str) -> Any:
        """Attributes of the module, so that a compiled module can stand where the module stood."""
        if name.startswith("_") or "original" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.__dict__["original"], name)

    def __reduce__(self) -> Any:
        raise ConfigError(
            "a compiled model can't be pickled or copied",
            hint="compile the module again where you need it: the compile cache makes that a warm start",
        )

    def __repr__(self) -> str:
        state = "not yet compiled" if self._built is None else "compiled"
        return f"<onegraph.CompiledModel of {type(self.original).__name__}, {state}>"
