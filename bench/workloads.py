"""What is measured, apart from who is measured: requests as token ids, and how many tokens to generate."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Workload:
    """`cache` says which compile cache a process starts with: an empty one, or one that was filled before.

    `measure` is `first_token` (seconds from the start of the process to the first token) or `generate` (seconds
    of the generation alone, after one unmeasured round of the same work).
    """

    name: str
    num_requests: int
    prompt_len: int
    output_len: int
    cache: Literal["empty", "filled"]
    measure: Literal["first_token", "generate"]

    def prompts(self, vocab_size: int) -> list[list[int]]:
        """Random token ids, the same for every engine; 0 ends a text and isn't among them."""
        rng = random.Random(self.name)
        return [[rng.randrange(1, vocab_size) for _ in range(self.prompt_len)] for _ in range(self.num_requests)]


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("cold_start", 1, 16, 1, "empty", "first_token"),
        Workload("warm_start", 1, 16, 1, "filled", "first_token"),
        Workload("single_stream", 1, 128, 128, "filled", "generate"),
        Workload("offline", 64, 128, 128, "filled", "generate"),
    )
}
