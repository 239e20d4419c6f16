"""Requests and their sequences: the state that scheduler, runner, sampler and engine share.

A `Request` is what a user adds: one prompt with its parameters. It holds `n` `Sequence`s, which are what is
scheduled: the tokens so far, how many of them have their keys and values in the cache, and the blocks where
they are.
"""

import random
import time
from dataclasses import dataclass, field

from onegraph.engine.detokenizer import Detokenizer
from onegraph.engine.kv_blocks import ROOT_PREFIX
from onegraph.engine.outputs import TokenLogprobs
from onegraph.engine.sampling_params import SamplingParams
from onegraph.engine.stopping import Stop, StopStrings

NO_ROW = -1


@dataclass(eq=False, slots=True)
class Sequence:
    """One sample of a request. Equal only to itself.

    token_ids: prompt and output. num_computed_tokens: how many, from the start, are in the KV cache.
    blocks, row: its KV blocks and its row of the block tables; none while it waits.
    num_registered_blocks, prefix: how far its full blocks are in the prefix index, and the number there.
    stream: the source of its random draws, one for each token that is sampled and not greedy.
    pieces: its text as it may be shown; num_sent_tokens, num_sent_pieces, ended:
        how far outputs of a stream have come.
    """

    request: "Request"
    index: int
    token_ids: list[int]
    max_tokens: int
    stream: random.Random
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    blocks: list[int] = field(default_factory=list)
    row: int = NO_ROW
    num_registered_blocks: int = 0
    prefix: int = ROOT_PREFIX
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    detokenizer: Detokenizer | None = None
    stop_strings: StopStrings | None = None
    pieces: list[str] = field(default_factory=list)
    num_sent_tokens: int = 0
    num_sent_pieces: int = 0
    ended: bool = False
    stop: Stop | None = None

    @property
    def params(self) -> SamplingParams:
        """Its request's."""
        return self.request.params

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens that the user gave."""
        return len(self.request.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        """The tokens generated so far (a copy)."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def text(self) -> str:
        """The text that may be shown so far."""
        return "".join(self.pieces)

    @property
    def finished(self) -> bool:
        """True once it has a reason to stop."""
        return self.stop is not None


@dataclass(eq=False, slots=True)
class Request:
    """One prompt with its parameters and its samples.

    stream: what is new is wanted at every step, not all at the end. prompt_logprobs: as far as computed.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    stream: bool = False
    arrival_s: float = field(default_factory=time.monotonic)
    first_token_s: float | None = None
    finished_s: float | None = None
    sequences: list[Sequence] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=lambda: [None])
    error: str | None = None

    @property
    def finished(self) -> bool:
        """True once every sample is."""
        return all(sequence.finished for sequence in self.sequences)

    @property
    def num_missing_prompt_logprobs(self) -> int:
        """Prompt positions whose log-probabilities were asked for and are not there yet."""
        if self.params.prompt_logprobs is None:
            return 0
        return len(self.prompt_token_ids) - len(self.prompt_logprobs)


def random_stream(seed: int | None, index: int, engine_seed: int, request_number: int) -> random.Random:
    """A sample's random stream: a function of the request's seed, or of the engine's and the place there.

    Seeded by text, which Python hashes with SHA-512 (version 2 of `random.seed`), so that streams of near
    seeds differ.
    """
    own = f"request {seed}" if seed is not None else f"engine {engine_seed} request number {request_number}"
    return random.Random(f"{own} sample {index}")
