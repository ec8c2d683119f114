"""What is known of one HTTP request when it is over: its line in the log, and its share of the metrics."""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

access = logging.getLogger("toolkit.serving.access")
_SAFE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


@dataclass
class Record:
    """One HTTP request.

    Attributes:
        id: the client's own `x-request-id` if it is short and plain, else a random one.
        method: of HTTP.
        endpoint: path of the route, not of the request: one of few.
        key: short hash of the API key, by which keys can be told apart in the log.
        model: that was asked for.
        prompt_tokens: of all prompts.
        tokens: of all answers.
        served: model and tokens of each finished answer.
        first_token: when the first token was there, in seconds of the monotonic clock.
        status: of the response.
    """

    id: str
    method: str
    endpoint: str = "other"
    key: str | None = None
    model: str | None = None
    prompt_tokens: int = 0
    tokens: int = 0
    served: list[tuple[str, int]] = field(default_factory=list)
    first_token: float | None = None
    status: int = 500
    arrived: float = field(default_factory=time.monotonic)
    ended: float | None = None

    @property
    def seconds(self) -> float:
        """How long it took, or takes."""
        return (self.ended or time.monotonic()) - self.arrived

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds until the first token of the first answer."""
        return None if self.first_token is None else self.first_token - self.arrived

    @property
    def time_per_token(self) -> float | None:
        """Seconds per token after the first, where one answer has several."""
        if self.first_token is None or len(self.served) != 1 or self.tokens < 2 or self.ended is None:
            return None
        return (self.ended - self.first_token) / (self.tokens - 1)

    def line(self) -> dict[str, Any]:
        """Return the fields of the log line; no text of prompts or answers is among them."""
        fields = {
            "request_id": self.id,
            "method": self.method,
            "endpoint": self.endpoint,
            "status": self.status,
            "key": self.key,
            "model": self.model,
            "models_used": sorted({model for model, _ in self.served}) or None,
            "prompt_tokens": self.prompt_tokens or None,
            "tokens": self.tokens or None,
            "seconds": round(self.seconds, 6),
            "time_to_first_token": self.time_to_first_token and round(self.time_to_first_token, 6),
        }
        return {name: value for name, value in fields.items() if value is not None}


def request_id(given: str | None) -> str:
    """Return a client's id if it can stand in a header and a log, else a new one."""
    return given if given and _SAFE_ID.fullmatch(given) else uuid.uuid4().hex


class JsonLines(logging.Formatter):
    """Writes a log record as one line of JSON; what `extra={"fields": ...}` carries becomes its keys."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)
