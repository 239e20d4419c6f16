"""What the endpoints take: the fields of OpenAI's completions and chat completions, and vLLM's sampling fields.

Values are taken as they are typed: a text is no number. A field that isn't known is refused by name, unless it is
null, which asks for nothing. Ranges here are those that no model can serve; the engine checks the rest.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

MAX_LOGPROBS = 20
# Each of these is looked through for every token that is generated, in the thread that serves everybody.
MAX_STOPS, MAX_STOP_LENGTH, MAX_STOP_TOKENS, MAX_BIASES = 16, 1000, 1000, 10_000
INT32, INT64 = 2**31 - 1, 2**63 - 1


def _unicode(text: str) -> str:
    """JSON can write half a surrogate pair, which is no text. Raises ValueError for it."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError("it has half a surrogate pair, which is no Unicode text") from error
    return text


UnicodeText = Annotated[str, AfterValidator(_unicode)]
TokenId = Annotated[int, Field(ge=0, le=INT32)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
StopString = Annotated[UnicodeText, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class Strict(BaseModel):
    """A part of a request: exact types, finite numbers, no field that isn't known."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_unknown_nulls(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: one for name, one in value.items() if one is not None or name in cls.model_fields}


class StreamOptions(Strict):
    """`include_usage` adds a last chunk with the counts of tokens."""

    include_usage: bool | None = None


class SamplingFields(Strict):
    """What both endpoints take."""

    model: UnicodeText | None = None
    n: Annotated[int, Field(ge=1, le=INT32)] | None = None
    temperature: Annotated[float, Field(ge=0, le=1e6)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-INT64 - 1, le=INT64)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=INT64)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[str, Bias], Field(max_length=MAX_BIASES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: UnicodeText | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0, le=INT64)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=INT32)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKENS, fail_fast=True)] | None = None


def _kind_of_prompt(value: Any) -> str:
    if not isinstance(value, list):
        return "text"
    first = value[0] if value else ""
    if isinstance(first, list):
        return "lists of token ids"
    return "texts" if isinstance(first, str) else "token ids"


Prompt = Annotated[
    Annotated[UnicodeText, Tag("text")]
    | Annotated[list[UnicodeText], Field(min_length=1, fail_fast=True), Tag("texts")]
    | Annotated[TokenIds, Tag("token ids")]
    | Annotated[list[TokenIds], Field(fail_fast=True), Tag("lists of token ids")],
    Discriminator(_kind_of_prompt),
]


class CompletionRequest(SamplingFields):
    """POST /v1/completions."""

    prompt: Prompt
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    best_of: Annotated[int, Field(ge=1, le=INT32)] | None = None
    echo: Literal[False] | None = None


class TextPart(Strict):
    """One part of a message's content."""

    type: Literal["text"]
    text: UnicodeText


class Message(Strict):
    """One message of a conversation; the model's chat template decides on roles and their order."""

    role: UnicodeText
    content: UnicodeText | list[TextPart] | None = None
    name: UnicodeText | None = None


class ResponseFormat(Strict):
    """Only plain text."""

    type: Literal["text"]


class ChatCompletionRequest(SamplingFields):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=INT64)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
