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


@dataclass(frozen=True)
class ServerWorkload:
    """Completions over HTTP: `concurrency` clients at a time, each level in turn, against one server process.

    Each client sends its next request when the last one has ended. A level has `rounds` requests for each of its
    clients, and at least `min_requests`; before it comes one unmeasured request for each client.
    """

    name: str = "server"
    concurrency: tuple[int, ...] = (1, 8, 32)
    prompt_len: int = 128
    output_len: int = 64
    rounds: int = 3
    min_requests: int = 8

    def num_requests(self, level: int) -> int:
        """Measured requests of a level."""
        return max(self.rounds * level, self.min_requests)

    def prompts(self, vocab_size: int, level: int) -> tuple[list[list[int]], list[list[int]]]:
        """(unmeasured, measured), none equal to another, so that no server finds its prefix computed."""
        rng = random.Random(f"{self.name} {level}")
        total = level + self.num_requests(level)
        prompts = [[rng.randrange(1, vocab_size) for _ in range(self.prompt_len)] for _ in range(total)]
        return prompts[:level], prompts[level:]


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("cold_start", 1, 16, 1, "empty", "first_token"),
        Workload("warm_start", 1, 16, 1, "filled", "first_token"),
        Workload("single_stream", 1, 128, 128, "filled", "generate"),
        Workload("offline", 64, 128, 128, "filled", "generate"),
    )
}

SERVER = ServerWorkload()
