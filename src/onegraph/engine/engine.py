"""The engine: continuous batching over a paged KV cache, one step at a time.

Takes: requests (token ids with parameters). Gives: from each step the outputs of requests that ended, and what is
new of those that stream. A step is three verbs: schedule, run, postprocess. Keeps: the unfinished requests. One
thread uses an engine; only `check_request` may be called from any.
"""

import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from onegraph.build_trace import trace_timeline
from onegraph.engine.admission import check_params, check_prompt
from onegraph.engine.detokenizer import Detokenizer
from onegraph.engine.limits import Limits
from onegraph.engine.logprobs import RankedToken, rank_tokens
from onegraph.engine.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput, TokenLogprobs
from onegraph.engine.recorded_batches import RecordedBatches
from onegraph.engine.request import Request, Sequence, random_stream
from onegraph.engine.runner import PromptRows, Runner, StepLogits
from onegraph.engine.sampler import Sampled, Sampler
from onegraph.engine.sampling_params import SamplingParams
from onegraph.engine.scheduler import Batch, Scheduler
from onegraph.engine.stopping import Stop, StopStrings, stop_by_token
from onegraph.engine.text import Text
from onegraph.errors import ConfigError
from onegraph.ir.recording import RecordedSize
from onegraph.ir.step_clock import StepClock
from onegraph.log import get_logger
from onegraph.numerics.oracle import SizeCheck
from onegraph.timeline import timeline

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """The queues and the KV blocks now; preemptions and generated tokens since the start."""

    num_running: int
    num_waiting: int
    num_free_blocks: int
    num_blocks: int
    num_preemptions: int
    num_generated_tokens: int


@dataclass(frozen=True, slots=True)
class StepResult:
    """A step's outputs. `failure` is what its batch raised; its requests are among the outputs then, with an error."""

    outputs: list[RequestOutput]
    failure: Exception | None = None


class Engine:
    """Serves requests with one model.

    `vocab_size` bounds token ids; `eos_token_ids` end a text; `seed` is for requests without their own.
    """

    def __init__(
        self,
        *,
        limits: Limits,
        scheduler: Scheduler,
        runner: Runner,
        text: Text,
        vocab_size: int,
        eos_token_ids: frozenset[int],
        seed: int,
    ) -> None:
        self.limits = limits
        self.text = text
        self._scheduler = scheduler
        self._runner = runner
        self._sampler = Sampler(eos_token_ids)
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._seed = seed
        self._num_added = 0
        self._num_generated_tokens = 0
        self._rehearses = False
        self._requests: dict[str, Request] = {}

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Seq[int],
        params: SamplingParams,
        *,
        prompt: str | None = None,
        stream: bool = False,
    ) -> None:
        """Queues a request; `prompt` is only handed back. With `stream` every step gives what is new of it.

        The output ends at max_model_len with finish_reason "length" where max_tokens would go beyond.
        Errors: those of `check_request` and `queue_request`; nothing is queued then.
        """
        self.check_request(prompt_token_ids, params, where=f"request {request_id!r}")
        self.queue_request(request_id, prompt_token_ids, params, prompt=prompt, stream=stream)

    def check_request(self, prompt_token_ids: Seq[int], params: SamplingParams, *, where: str) -> None:
        """Raises ConfigError for a prompt or parameters that this model can't serve. Any thread may call it."""
        check_prompt(prompt_token_ids, limits=self.limits, vocab_size=self._vocab_size, where=where)
        check_params(params, text=self.text, vocab_size=self._vocab_size, where=where)

    def queue_request(
        self,
        request_id: str,
        prompt_token_ids: Seq[int],
        params: SamplingParams,
        *,
        prompt: str | None = None,
        stream: bool = False,
    ) -> None:
        """As `add_request`, for what `check_request` has let pass.

        Errors: ConfigError for an id in use, StateChangedError for a module that was changed where that is an error.
        """
        if request_id in self._requests:
            raise ConfigError(f"request_id={request_id!r} is already in use", hint="give another")
        if not self._requests:
            self._runner.check_state()  # the event at which an idle engine's module may have changed
            if self._scheduler.enable_prefix_caching and self._runner.weights_changed():
                self._scheduler.reset()  # blocks that other weights have computed
        request = Request(request_id, prompt, tuple(prompt_token_ids), params, stream)
        room = self.limits.max_model_len - len(prompt_token_ids)
        for index in range(params.n):
            sequence = Sequence(
                request=request,
                index=index,
                token_ids=list(prompt_token_ids),
                max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
                stream=random_stream(params.seed, index, self._seed, self._num_added),
                stop_strings=StopStrings(params.stop_strings) if params.stop_strings else None,
                detokenizer=(
                    Detokenizer(self.text.decode, self.text.silent_ids) if stream or params.stop_strings else None
                ),
            )
            request.sequences.append(sequence)
            self._scheduler.add(sequence)
        self._requests[request_id] = request
        self._num_added += 1

    def warm_up(self, num_tokens: int) -> None:
        """Compiles or loads the model before the first request."""
        self._runner.warm_up(num_tokens)

    @property
    def traffic(self) -> Mapping[int, int]:
        """Batches so far by their numbers of tokens, of those that a recording may stand for."""
        return self._runner.traffic

    @property
    def unrecordable(self) -> str | None:
        """Why nothing is recorded where that was to be tried; None where something is, or nothing was to be."""
        return self._runner.unrecordable

    def record_nothing(self, why: str) -> None:
        """No batch is recorded; `unrecordable` says why."""
        self._runner.record_nothing(why)

    def record_largest(self, batches: RecordedBatches) -> RecordedSize:
        """Records the largest of the batches, and tells what it took. Raises RecordingError."""
        return self._runner.record_largest(batches)

    def record(
        self,
        batches: RecordedBatches,
        progress: Callable[[int, int], None],
        *,
        lazily_at: int | None = None,
        if_it_can: bool = False,
    ) -> None:
        """Records the model for these batches; with `lazily_at`, each when it comes for so many times.

        Raises RecordingError, but for `if_it_can`.
        """
        self._runner.record(batches, progress, lazily_at=lazily_at, if_it_can=if_it_can)

    def tell_recorded(self, told: Callable[[], None]) -> None:
        """Has `told` called after each batch that is recorded when it comes."""
        self._runner.told_recorded = told

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""
        return self._vocab_size

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self._runner.device

    def timed(self, clock: StepClock) -> AbstractContextManager[bool]:
        """Has the clock see into the model's calls; see `CompiledModel.timed`, and `StepProfiler` for the rest."""
        return self._runner.timed(clock)

    def check(self, num_sizes: int) -> tuple[SizeCheck, ...]:
        """The compiled model against eager and fp64 at `num_sizes` batch sizes; forgets the prefix cache.

        Raises ConfigError while requests are running, and for a model that isn't compiled.
        """
        if self._requests:
            raise ConfigError("requests are running, and the check would write over their KV cache")
        try:
            return self._runner.check(num_sizes)
        finally:
            self.reset()

    def has_unfinished(self) -> bool:
        """True while a step would do something."""
        return bool(self._requests)

    def step(self) -> list[RequestOutput]:
        """Computes one batch; gives the outputs of requests that ended in it, and what is new of those that stream.

        Errors: what the model raises; the requests of the batch are dropped then, others go on.
        """
        result = self.try_step()
        if result.failure is not None:
            raise result.failure
        return result.outputs

    def try_step(self) -> StepResult:
        """As `step`, but what a batch raises is in the result, and in the outputs of its requests as their error."""
        batch = self._scheduler.schedule()
        if batch is None:
            return StepResult([])
        try:
            logits, sampled = self._run(batch)
        except Exception as error:  # noqa: BLE001 - whatever it is, it ends this batch and nothing else
            told = f"the batch failed: {type(error).__name__}"
            names = {item.sequence.request.request_id for item in batch.scheduled}
            dropped = [self._dropped(name, told) for name in sorted(names)]
            return StepResult([output for output in dropped if output is not None], error)
        return StepResult(self._postprocess(batch, logits, sampled))

    def abort(self, request_id: str) -> RequestOutput | None:
        """Ends a request and frees its blocks; gives what it had so far, None for one that isn't there."""
        return self._dropped(request_id, None)

    def rehearse(self) -> None:
        """Serves two short requests and forgets them: what is made when it is first used is made then.

        Errors: ConfigError while requests are running, and what the model raises.
        """
        if self._requests:
            raise ConfigError("requests are running, and the rehearsal would forget them")
        added, generated = self._num_added, self._num_generated_tokens
        params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, logprobs=0)
        self._rehearses = True
        try:
            for number, length in enumerate((3, 2)):
                prompt = [0] * min(length, self.limits.max_model_len - 1)
                if prompt:
                    self.add_request(f"rehearsal {number}", prompt, params)
            while self.has_unfinished():
                self.step()
        finally:
            self.reset()
            self._rehearses = False
            self._num_added, self._num_generated_tokens = added, generated

    def reset(self) -> None:
        """Drops all requests and the prefix cache, in whatever state an interrupted step left them."""
        self._requests.clear()
        self._scheduler.reset()

    @property
    def stats(self) -> EngineStats:
        """How busy it is."""
        scheduler = self._scheduler
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_free_blocks=scheduler.pool.num_free,
            num_blocks=scheduler.pool.num_blocks,
            num_preemptions=scheduler.num_preemptions,
            num_generated_tokens=self._num_generated_tokens,
        )

    def _run(self, batch: Batch) -> tuple[StepLogits, Sampled]:
        with torch.inference_mode():
            step = self._runner.run(batch)
            for rows in step.prompts:
                self._rank_prompt(step, rows)
            if not step.sequences:
                return step, Sampled([], [], frozenset())
            all_rows = len(step.rows) == step.logits.shape[0]
            return step, self._sampler(step.logits if all_rows else step.logits[list(step.rows)], step.sequences)

    def _postprocess(self, batch: Batch, step: StepLogits, sampled: Sampled) -> list[RequestOutput]:
        self._scheduler.computed(batch)
        now = time.monotonic()
        touched: dict[str, Request] = {}
        for row, sequence in enumerate(step.sequences):
            request = sequence.request
            touched[request.request_id] = request
            if row in sampled.broken:
                request.error = "the model's logits have no finite maximum (NaN or infinity), so no token can be chosen"
                log.error(
                    "request %s ended after %d tokens: %s",
                    request.request_id,
                    sequence.num_output_tokens,
                    request.error,
                )
                self._finish(sequence, Stop("abort"))
                continue
            if request.first_token_s is None:
                request.first_token_s = now
                if not self._rehearses and timeline.has_first_token():
                    trace_timeline()
            self._append(sequence, sampled.token_ids[row], sampled.ranked[row])
        for request in touched.values():
            if request.finished:
                request.finished_s = now
                del self._requests[request.request_id]
        return [self._output(request) for request in touched.values() if request.finished or request.stream]

    def _dropped(self, request_id: str, error: str | None) -> RequestOutput | None:
        request = self._requests.pop(request_id, None)
        if request is None:
            return None
        for sequence in request.sequences:
            if not sequence.finished:
                self._finish(sequence, Stop("abort"))
        request.error = error
        request.finished_s = time.monotonic()
        return self._output(request)

    def _append(self, sequence: Sequence, token_id: int, ranked: list[RankedToken] | None) -> None:
        """Adds a sampled token, and ends the sequence where the token, the text or a length does."""
        sequence.token_ids.append(token_id)
        self._num_generated_tokens += 1
        if ranked is not None:
            sequence.logprobs.append(self._logprobs(ranked))
            sequence.cumulative_logprob += next(r.logprob for r in ranked if r.token_id == token_id)
        params, num_output = sequence.params, sequence.num_output_tokens
        stop = stop_by_token(token_id, num_output, params, self._eos_token_ids)
        if stop is None:
            stop = self._stop_by_string(sequence, token_id)
        if stop is None and num_output >= sequence.max_tokens:
            stop = Stop("length")
        if stop is not None:
            self._finish(sequence, stop)

    def _stop_by_string(self, sequence: Sequence, token_id: int) -> Stop | None:
        if sequence.detokenizer is None:
            return None
        added = sequence.detokenizer.append(token_id)
        # A stop string may not begin in the text of the first min_tokens tokens.
        searched = sequence.num_output_tokens >= sequence.params.min_tokens
        return self._show(sequence, added, searched=searched)

    def _show(self, sequence: Sequence, added: str, *, searched: bool = True) -> Stop | None:
        """Adds to the text that may be shown; gives the stop where a stop string is in it."""
        found = None
        if sequence.stop_strings is not None and searched:
            added, found = sequence.stop_strings.let_through(added)
        if added:
            sequence.pieces.append(added)
        return None if found is None else Stop("stop", found)

    def _finish(self, sequence: Sequence, stop: Stop) -> None:
        sequence.stop = stop
        self._scheduler.remove(sequence)
        if isinstance(stop.reason, str):
            return  # the text was cut before the stop string
        token_ids = sequence.output_token_ids
        if stop.finish_reason == "stop":
            token_ids.pop()  # the token that ended the text is not part of it
        if sequence.detokenizer is None:
            sequence.pieces.append(self.text.decode(token_ids))
            return
        searched = len(token_ids) >= sequence.params.min_tokens
        found = self._show(sequence, sequence.detokenizer.finish(token_ids), searched=searched)
        if found is not None:
            sequence.stop = found  # its last character was waiting in the detokenizer
        elif sequence.stop_strings is not None:
            sequence.pieces.append(sequence.stop_strings.rest())

    def _rank_prompt(self, step: StepLogits, rows: PromptRows) -> None:
        request, num_rows = rows.sequence.request, len(rows.token_ids)
        ranked = rank_tokens(
            step.logits[rows.first_row : rows.first_row + num_rows],
            torch.tensor(rows.token_ids, device=step.logits.device),
            [request.params.prompt_logprobs or 0] * num_rows,
        )
        request.prompt_logprobs.extend(self._logprobs(one) for one in ranked)

    def _logprobs(self, ranked: list[RankedToken]) -> TokenLogprobs:
        return {r.token_id: Logprob(r.logprob, r.rank, self.text.token(r.token_id)) for r in ranked}

    def _output(self, request: Request) -> RequestOutput:
        """All of a request, or what is new of one that streams; the cost is that of what is in it."""
        samples = request.sequences
        if request.stream:
            samples = [s for s in samples if s.num_output_tokens > s.num_sent_tokens or (s.finished and not s.ended)]
        return RequestOutput(
            request_id=request.request_id,
            prompt=request.prompt,
            prompt_token_ids=request.prompt_token_ids if request.stream else list(request.prompt_token_ids),
            outputs=[_completion(sequence) for sequence in samples],
            finished=request.finished,
            prompt_logprobs=list(request.prompt_logprobs) if request.params.prompt_logprobs is not None else None,
            metrics=RequestMetrics(
                arrival_s=request.arrival_s,
                first_token_s=request.first_token_s,
                finished_s=request.finished_s,
                num_cached_tokens=request.sequences[0].num_cached_tokens,
            ),
            error=request.error,
        )


def _completion(sequence: Sequence) -> CompletionOutput:
    """A sample from where its last output ended; a request that doesn't stream has but one output."""
    with_logprobs = sequence.params.logprobs is not None
    first, first_piece = sequence.num_sent_tokens, sequence.num_sent_pieces
    sequence.num_sent_tokens, sequence.num_sent_pieces = sequence.num_output_tokens, len(sequence.pieces)
    sequence.ended = sequence.finished
    return CompletionOutput(
        index=sequence.index,
        text="".join(sequence.pieces[first_piece:]),
        token_ids=sequence.token_ids[sequence.num_prompt_tokens + first :],
        finish_reason=sequence.stop.finish_reason if sequence.stop else None,
        stop_reason=sequence.stop.reason if sequence.stop else None,
        logprobs=sequence.logprobs[first:] if with_logprobs else None,
        cumulative_logprob=sequence.cumulative_logprob if with_logprobs else None,
    )
