"""What clients of the OpenAI protocol send, checked; and what they get back.

What cannot be honoured is refused, never ignored: unknown fields, and known ones (tools, response_format, logit_bias…)
at anything but their defaults, which clients may well spell out. Messages name fields and bounds, never what was sent.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

MOST_CHOICES = 128
Text = Annotated[str, StringConstraints(max_length=4_000_000)]
Token = Annotated[int, Field(ge=0, lt=2**31)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=256)]
NotHonoured = Literal[None]
Nothing = Annotated[list[NotHonoured], Field(max_length=0)]
Books = Annotated[str, StringConstraints(max_length=512)]  # for the caller's books; nothing here depends on it


class ApiError(Exception):
    """An answer of status `status` with an OpenAI-shaped body."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.retry = status, retry
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    include_obfuscation: bool = False


class _Request(BaseModel):
    """What completions and chat completions have in common."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: Text
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    presence_penalty: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    frequency_penalty: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    user: Books | None = None
    logit_bias: dict[str, float] | None = Field(None, max_length=0)

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> "_Request":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream=true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def with_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(_Request):
    """POST /v1/completions. prompt: a text, a list of texts, tokens, or a list of lists of tokens."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MOST_CHOICES)]
        | Annotated[list[Token], Field(min_length=1)]
        | Annotated[list[Annotated[list[Token], Field(min_length=1)]], Field(min_length=1, max_length=MOST_CHOICES)]
    )
    logprobs: int | None = Field(None, ge=0, le=5)
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    suffix: NotHonoured = None

    @property
    def best(self) -> int | None:
        """How many of the best tokens to report; None for no report."""
        return self.logprobs

    @property
    def limit(self) -> int | None:
        return 16 if self.max_tokens is None else self.max_tokens

    @property
    def prompts(self) -> list[str | list[int]]:
        prompt: Any = self.prompt
        return list(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: Text


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Part]
    name: Text | None = None
    # What an answer of ours, sent back as it is, has beside its content.
    refusal: NotHonoured = None
    annotations: Nothing | None = None
    audio: NotHonoured = None
    function_call: NotHonoured = None
    tool_calls: Nothing | None = None

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": content, **({} if self.name is None else {"name": self.name})}


class TextFormat(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=4096)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: TextFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    tools: Nothing | None = None
    tool_choice: Literal["none", "auto"] | None = None  # of no tools
    parallel_tool_calls: bool | None = None
    functions: Nothing | None = None
    function_call: Literal["none", "auto"] | None = None
    store: Literal[False] | None = None
    metadata: Annotated[dict[Books, Books], Field(max_length=16)] | None = None
    safety_identifier: Books | None = None
    prompt_cache_key: Books | None = None
    service_tier: Literal["auto", "default"] | None = None
    verbosity: Literal["medium"] | None = None
    reasoning_effort: NotHonoured = None
    audio: NotHonoured = None
    moderation: NotHonoured = None
    prediction: NotHonoured = None
    prompt_cache_options: NotHonoured = None
    prompt_cache_retention: NotHonoured = None
    web_search_options: NotHonoured = None

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        return self

    @property
    def best(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


def parse(kind: type[BaseModel], body: bytes) -> Any:
    """The request in a body. Raises ApiError 400 naming the first field that is wrong."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        known = kind.model_fields
        param = str(first["loc"][0]) if first["loc"] and first["loc"][0] in known else None
        message = first["msg"] if param or first["type"] != "extra_forbidden" else "a field is not known here"
        where = f"{param}: " if param else ""
        if first["type"] == "json_invalid":
            message = "the body must be JSON"
        raise ApiError(400, f"{where}{message}", param=param) from None


def usage(prompt: int, completion: int) -> dict[str, int]:
    """Token counts, as the protocol has them."""
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
