"""Bars for the stages of a start, on terminals only."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from tqdm import tqdm


class Progress(Protocol):
    """Told each step as it begins, and how far it is."""

    def __call__(self, step: str, detail: str = "") -> None: ...


@contextmanager
def bar(title: str, num_steps: int) -> Iterator[Progress]:
    """A bar for one stage of the start; for terminals only."""
    with tqdm(desc=title, total=num_steps, unit="step", disable=None, leave=False) as shown:
        begun: list[str] = []

        def tell(step: str, detail: str = "") -> None:
            if begun[-1:] != [step]:
                shown.update(1 if begun else 0)  # the step before is done
                begun.append(step)
            shown.set_postfix_str(f"{step}, {detail}" if detail else step)

        yield tell
