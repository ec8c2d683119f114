"""What the server answers, as its OpenAPI document describes it.

The answers themselves are written by `writer`, `logprobs`, `embeddings` and `adapters`, without these classes between
them and the wire; tests hold each against the document.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from pydantic.json_schema import SkipJsonSchema

from toolkit.routing.policy import Reason


class ResponseBody(BaseModel):
    """A JSON object with these keys and no others; one whose default is `None` may be absent, and is null only where
    its type says so."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class ErrorDetail(ResponseBody):
    """What went wrong, and the field of the body that it is about."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(ResponseBody):
    """Every answer whose status is 400 or more."""

    error: ErrorDetail


class Usage(ResponseBody):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Routing(ResponseBody):
    """What the router chose and why, how far the best is ahead of the second (null where there is one alone), the
    scores of all that it chooses among, and the version of the router; a stream has it in the first event of an answer.
    """

    expert: str
    reason: Reason
    margin: float | None
    scores: dict[str, float]
    version: str


class CompletionLogprobs(ResponseBody):
    """Of each token; nothing is known of the first of a prompt."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(ResponseBody):
    """One answer."""

    index: int
    text: str
    finish_reason: Literal["stop", "length"]
    logprobs: CompletionLogprobs | None
    routing: Routing | SkipJsonSchema[None] = None


class CompletionChunkChoice(ResponseBody):
    """What is new of one answer; the reason comes with the last of it."""

    index: int
    text: str
    finish_reason: Literal["stop", "length"] | None
    logprobs: CompletionLogprobs | None
    routing: Routing | SkipJsonSchema[None] = None


class Completion(ResponseBody):
    """The body of `/v1/completions`."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    routing: Routing | SkipJsonSchema[None] = None


class CompletionChunk(ResponseBody):
    """An event of a stream of `/v1/completions`; one without choices counts tokens."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChunkChoice]
    usage: Usage | SkipJsonSchema[None] = None
    routing: Routing | SkipJsonSchema[None] = None


class TokenEntry(ResponseBody):
    """A token and how likely it was."""

    token: str
    logprob: float
    bytes: list[int]


class ScoredToken(TokenEntry):
    """A token of an answer, and those that were most likely in its place."""

    top_logprobs: list[TokenEntry]


class ChatLogprobs(ResponseBody):
    """Of each token of an answer."""

    content: list[ScoredToken]
    refusal: None


class Called(ResponseBody):
    """A function, with the JSON of its arguments."""

    name: str
    arguments: str


class MadeCall(ResponseBody):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: Called


class MadeCallChunk(MadeCall):
    """A call of a tool, with its place among those of the answer."""

    index: int


class ChatMessage(ResponseBody):
    """An answer; one that is nothing but calls has no content."""

    role: Literal["assistant"]
    content: str | None
    tool_calls: list[MadeCall] | SkipJsonSchema[None] = None


class ChatDelta(ResponseBody):
    """What is new of an answer."""

    role: Literal["assistant"] | SkipJsonSchema[None] = None
    content: str | SkipJsonSchema[None] = None
    tool_calls: list[MadeCallChunk] | SkipJsonSchema[None] = None


class ChatChoice(ResponseBody):
    """One answer."""

    index: int
    message: ChatMessage
    finish_reason: Literal["stop", "length", "tool_calls"]
    logprobs: ChatLogprobs | None


class ChatChunkChoice(ResponseBody):
    """What is new of one answer; the reason comes with the last of it."""

    index: int
    delta: ChatDelta
    finish_reason: Literal["stop", "length", "tool_calls"] | None
    logprobs: ChatLogprobs | None


class ChatCompletion(ResponseBody):
    """The body of `/v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    routing: Routing | SkipJsonSchema[None] = None


class ChatCompletionChunk(ResponseBody):
    """An event of a stream of `/v1/chat/completions`; one without choices counts tokens."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | SkipJsonSchema[None] = None
    routing: Routing | SkipJsonSchema[None] = None


class Embedding(ResponseBody):
    """A vector, or the base64 of its little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(ResponseBody):
    """Token counts."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(ResponseBody):
    """The body of `/v1/embeddings`."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class ModelEntry(ResponseBody):
    """What a request can ask for."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: Literal["composition-toolkit"]


class ModelList(ResponseBody):
    """The body of `/v1/models`."""

    object: Literal["list"]
    data: list[ModelEntry]


class RouterEntry(ResponseBody):
    """The router in use: since when, what was decided since the server started, drift by measure (the population
    stability index of the last decisions against the fit; empty while unknown), and why a newer one is refused."""

    object: Literal["router"]
    kind: str
    experts: list[str]
    fallback: str
    version: str
    since: int
    decisions: dict[str, int]
    reasons: dict[str, int]
    drift: dict[str, float]
    refused: str | None


class AdapterEntry(ResponseBody):
    """A loaded adapter; its version is a hash of its content."""

    id: str
    object: Literal["adapter"]
    version: str
    path: str
    description: str
    base: str | None
    bytes: int
    pages: int


class LoadedAdapter(AdapterEntry):
    """An adapter that was asked to be loaded, and what came of it."""

    status: Literal["loaded", "reloaded", "unchanged"]


class AdapterList(ResponseBody):
    """The body of `/v1/adapters`."""

    object: Literal["list"]
    data: list[AdapterEntry]


class DeletedAdapter(ResponseBody):
    """An adapter that is no longer there."""

    id: str
    object: Literal["adapter"]
    deleted: Literal[True]


class FileEntry(ResponseBody):
    """A file that a client sent."""

    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    filename: str
    purpose: Literal["fine-tune"]
    status: Literal["processed"]


class FileList(ResponseBody):
    """A page of the files, the newest first."""

    object: Literal["list"]
    data: list[FileEntry]
    has_more: bool


class DeletedFile(ResponseBody):
    """A file that is no longer there."""

    id: str
    object: Literal["file"]
    deleted: Literal[True]


class JobHyperparameters(ResponseBody):
    """What a job chose; `auto` is the server's choice."""

    n_epochs: int | Literal["auto"]
    batch_size: int | Literal["auto"]
    learning_rate_multiplier: float | Literal["auto"]


class SupervisedMethod(ResponseBody):
    """Of the method of this name."""

    hyperparameters: JobHyperparameters


class JobMethod(ResponseBody):
    """How a job trains."""

    type: Literal["supervised"]
    supervised: SupervisedMethod


class JobError(ResponseBody):
    """Why a job failed."""

    code: Literal["training_failed"]
    message: str
    param: None


class FineTuningJob(ResponseBody):
    """A job of fine-tuning; its model is served once it has succeeded."""

    id: str
    object: Literal["fine_tuning.job"]
    created_at: int
    error: JobError | None
    fine_tuned_model: str | None
    finished_at: int | None
    hyperparameters: JobHyperparameters
    method: JobMethod
    model: str
    organization_id: Literal[""]
    result_files: list[str]
    seed: int
    status: Literal["queued", "running", "succeeded", "failed", "cancelled"]
    trained_tokens: int | None
    training_file: str
    validation_file: str | None
    metadata: dict[str, str]
    integrations: list[str]


class FineTuningJobs(ResponseBody):
    """A page of the jobs, the newest first."""

    object: Literal["list"]
    data: list[FineTuningJob]
    has_more: bool


class JobMetrics(ResponseBody):
    """Losses at a step."""

    step: int
    train_loss: float | SkipJsonSchema[None] = None
    valid_loss: float | SkipJsonSchema[None] = None


class FineTuningEvent(ResponseBody):
    """What happened to a job."""

    id: str
    object: Literal["fine_tuning.job.event"]
    created_at: int
    level: Literal["info", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: JobMetrics | None


class FineTuningEvents(ResponseBody):
    """A page of the events of a job, the latest first."""

    object: Literal["list"]
    data: list[FineTuningEvent]
    has_more: bool


class FineTuningCheckpoints(ResponseBody):
    """No page of checkpoints: only finished adapters are served."""

    object: Literal["list"]
    data: list[str]
    has_more: Literal[False]


class Health(ResponseBody):
    """The engine runs."""

    status: Literal["ok"]


class Ready(ResponseBody):
    """More requests are taken."""

    status: Literal["ready"]


EVENTS: Mapping[str, type[ResponseBody]] = {
    "/v1/completions": CompletionChunk,
    "/v1/chat/completions": ChatCompletionChunk,
}
"""The events of each endpoint's stream."""

NAMED = (ErrorResponse, *EVENTS.values())
"""What is referred to by name alone, so that the framework does not see it."""

_REASONS = {
    400: "The request is wrong, or cannot be answered.",
    401: "No API key, or a wrong one.",
    403: "The path is outside of the folders that adapters may come from.",
    404: "There is no such thing.",
    409: "The adapter is in use.",
    413: "The body is larger than the server takes.",
    429: "The queue is full, or requests come too fast.",
    500: "The server failed.",
    503: "No requests are taken just now.",
    504: "The time that the request allowed is over.",
}
_HEADERS = {
    401: {"WWW-Authenticate": {"schema": {"type": "string"}, "description": "`Bearer`."}},
    429: {"Retry-After": {"schema": {"type": "string"}, "description": "Seconds to wait before the next try."}},
}
BODY_ERRORS = (400, 401, 413, 429, 500)
"""Statuses of refusals and failures that whatever takes a body can answer."""


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the documentation of error statuses, as a route takes it."""
    # Named by hand: the framework would give it the type of the route's other answers, which may be plain text.
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorResponse"}}}
    return {
        status: {"content": content, "description": _REASONS[status], "headers": _HEADERS.get(status, {})}
        for status in statuses
    }


def streamed(path: str) -> dict[int | str, dict[str, Any]]:
    """Return the documentation of the other form of an answer: a stream of events."""
    event = EVENTS[path].__name__
    text = f"Events whose data are the JSON of a {event}; the last is `[DONE]`. An error inside has an error's body."
    schema = {"type": "string", "description": text, "x-event-schema": {"$ref": f"#/components/schemas/{event}"}}
    named = {"x-toolkit-model": {"schema": {"type": "string"}, "description": "What answered, percent-encoded."}}
    return {200: {"content": {"text/event-stream": {"schema": schema}}, "headers": named}}
