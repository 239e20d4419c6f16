"""The offline LLM: prompts in, texts out, on the same engine that a server runs.

Takes: the model and the engine's settings at construction; prompts and `SamplingParams` at each call. Gives:
`RequestOutput`s in the order of the prompts. Keeps: the engine; calls from several threads run one after the
other.
"""

import logging
import os
import threading
from collections.abc import Mapping, Sequence
from itertools import count
from numbers import Integral
from typing import Any

from tqdm import tqdm

from onegraph.config.compilation import CompilationConfig
from onegraph.config.engine import EngineConfig
from onegraph.engine.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from onegraph.engine.sampling_params import SamplingParams
from onegraph.engine.startup import start_engine
from onegraph.engine.summary import summarise
from onegraph.env import environment
from onegraph.errors import ConfigError
from onegraph.explanation import Explanation
from onegraph.log import get_logger, set_level
from onegraph.numerics.oracle import SizeCheck

__all__ = ["LLM", "CompletionOutput", "Logprob", "RequestMetrics", "RequestOutput", "SamplingParams"]

log = get_logger(__name__)

Prompt = str | Mapping[str, Any]
Message = Mapping[str, Any]


class LLM:
    """A model that is loaded, compiled and ready to generate.

    model: a folder or hub id of a transformers model; None is the model that ships with onegraph.
    dtype: "auto" (the checkpoint's), "float32", "bfloat16", "float16" or a torch dtype.
    device: "cpu" or "cuda" (the current one); "auto" is CUDA where there is a GPU.
    enforce_eager, compilation_config: no compiling at all; else a CompilationConfig, a dict of its fields, or
        0..3.
    max_model_len: most tokens of a prompt with its output (None: the model's own, or what the KV cache
        holds).
    max_num_seqs, max_num_batched_tokens: most sequences, and tokens, of one step (None: 2048).
    num_kv_blocks, block_size: the KV cache; None sizes it from the memory that is there.
    enable_prefix_caching: prompts that begin alike share computed blocks.
    seed: of the requests that bring none. trust_remote_code: run Python code that comes with the model.
    artifact: a file that `save` wrote; a model, setting or machine that it isn't for is an ArtifactError.
    Errors: ConfigError for settings, ModelError for the model, and what compiling raises.
    """

    def __init__(
        self,
        model: Any = None,
        *,
        dtype: Any = "auto",
        device: str = "auto",
        enforce_eager: bool = False,
        compilation_config: CompilationConfig | Mapping[str, Any] | int | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int | None = None,
        num_kv_blocks: int | None = None,
        block_size: int = 16,
        enable_prefix_caching: bool = True,
        tensor_parallel_size: int = 1,
        seed: int = 0,
        trust_remote_code: bool = False,
        artifact: str | os.PathLike[str] | None = None,
    ) -> None:
        if (level := environment().log_level) != "WARNING":
            set_level(level)
        config = EngineConfig(
            model=model,
            dtype=dtype,
            device=device,
            enforce_eager=enforce_eager,
            compilation_config=compilation_config,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            num_kv_blocks=num_kv_blocks,
            block_size=block_size,
            enable_prefix_caching=enable_prefix_caching,
            tensor_parallel_size=tensor_parallel_size,
            seed=seed,
            trust_remote_code=trust_remote_code,
            artifact=artifact,
        )
        self._started = start_engine(config)
        self.engine = self._started.engine
        self._generating = threading.Lock()
        self._numbers = count()
        if log.isEnabledFor(logging.INFO):
            for line in self.summary().splitlines():
                log.info(line)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Continues prompts, together; gives one output each, in their order.

        prompts: one or a list of texts or `{"prompt_token_ids": [...]}`. sampling_params: one for all, or one
            each.
        Errors: ConfigError for a prompt or parameter, before anything is computed. A failure or Ctrl-C ends
        the call's requests and leaves the LLM usable.
        """
        several = [prompts] if isinstance(prompts, str | Mapping) else prompts
        encoded = [self._encode(prompt) for prompt in several]
        return self._generate(encoded, sampling_params, use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answers one conversation, or each of a list of them, by the model's chat template.

        messages: `[{"role": "user", "content": "hi"}, ...]`. Errors: ModelError for a model without a chat
        template, else as `generate`.
        """
        if not messages:
            raise ConfigError("no messages were given", where="chat", hint='give [{"role": "user", "content": "hi"}]')
        one = isinstance(messages[0], Mapping)
        conversations: Any = [messages] if one else messages
        encoded = [self.engine.text.encode_chat(conversation) for conversation in conversations]
        return self._generate(encoded, sampling_params, use_tqdm)

    def explain(self) -> Explanation:
        """How the model was compiled: `.to_dict()`, or `str()` of it."""
        return self._started.explain()

    def check(self, num_sizes: int = 8) -> tuple[SizeCheck, ...]:
        """Compares the compiled model with eager and with fp64 at `num_sizes` batch sizes; `explain` shows it too.

        Errors: ConfigError for a model that isn't compiled.
        """
        with self._generating:
            return self.engine.check(num_sizes)

    def reset_prefix_cache(self) -> None:
        """Forgets the KV of all prompts. Weights that are written or replaced are seen, and need no call of this.

        What torch doesn't count isn't: `weight.data.copy_(…)`, or another process that writes shared memory.
        """
        with self._generating:
            self.engine.reset()

    def save(self, file: str | os.PathLike[str]) -> None:
        """Writes what was compiled to one file, for `LLM(artifact=file)`: no weights.

        Errors: ConfigError where nothing is compiled, ArtifactError for what can't be kept or written.
        """
        self._started.compiled.save(file)

    def summary(self) -> str:
        """A few lines on what was started: model, KV cache, cold or warm, compile cache, what is on and
        off.
        """
        return summarise(self._started)

    def get_tokenizer(self) -> Any:
        """The transformers tokenizer; None for a model without one."""
        return self.engine.text.tokenizer

    def _encode(self, prompt: Any) -> tuple[str | None, list[int]]:
        if isinstance(prompt, str):
            return prompt, self.engine.text.encode(prompt)
        if isinstance(prompt, Mapping) and set(prompt) == {"prompt_token_ids"}:
            ids = prompt["prompt_token_ids"]
            if isinstance(ids, Sequence) and all(isinstance(i, Integral) for i in ids):
                return None, [int(i) for i in ids]
        raise ConfigError(
            f"{prompt!r:.80} is not a prompt",
            where="the prompts",
            hint='give a text, {"prompt_token_ids": [...]}, or a list of these',
        )

    def _generate(
        self,
        prompts: Sequence[tuple[str | None, list[int]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        params = _one_each(sampling_params, len(prompts))
        with self._generating:
            names = [str(next(self._numbers)) for _ in prompts]
            try:
                for name, (text, token_ids), one in zip(names, prompts, params, strict=True):
                    self.engine.add_request(name, token_ids, one, prompt=text)
                return self._drain(names, use_tqdm)
            except Exception:
                for name in names:
                    self.engine.abort(name)
                raise
            except BaseException:
                self.engine.reset()  # an interrupt may have left a step half done
                raise

    def _drain(self, names: list[str], use_tqdm: bool) -> list[RequestOutput]:
        outputs: dict[str, RequestOutput] = {}
        before = self.engine.stats.num_generated_tokens
        with tqdm(total=len(names), desc="generate", unit="prompt", disable=not use_tqdm) as bar:
            while self.engine.has_unfinished():
                finished = self.engine.step()
                outputs.update((output.request_id, output) for output in finished)
                if use_tqdm:
                    rate = (self.engine.stats.num_generated_tokens - before) / (bar.format_dict["elapsed"] or 1e-9)
                    bar.set_postfix_str(f"{rate:.1f} tokens/s", refresh=False)
                    bar.update(len(finished))
        return [outputs[name] for name in names]


def _one_each(params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int) -> list[SamplingParams]:
    if params is None:
        return [SamplingParams()] * num_prompts
    if isinstance(params, SamplingParams):
        return [params] * num_prompts
    given = list(params)
    if len(given) != num_prompts or not all(isinstance(one, SamplingParams) for one in given):
        raise ConfigError(
            f"{len(given)} sampling_params were given for {num_prompts} prompts",
            where="sampling_params",
            hint="give one SamplingParams for all prompts, or a list with one for each",
        )
    return given
