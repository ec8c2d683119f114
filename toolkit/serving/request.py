"""One request to the engine: what was asked for, and how far it is."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from toolkit.errors import RequestError

SEEDS = (-(2**63), 2**64 - 1)
"""Smallest and largest seed that torch's generators take."""

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        max_tokens: most tokens to generate; `None` for the engine's `limits.default_max_tokens`, or as many as fit.
        temperature: of the softmax; 0, or less than 1e-5, takes the most likely token.
        top_k: choose among this many most likely tokens; 0 among all.
        top_p: choose among the fewest tokens that hold this much of the probability.
        seed: makes the choice reproducible, whatever else is in the batch.
        stop: texts that end the answer; they are not part of it.
        stop_token_ids: tokens that end it, besides the model's own.
        ignore_eos: go on after the model's end token.

    Raises:
        RequestError: a value that means nothing.
    """

    max_tokens: int | None = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        least, most = SEEDS
        checks = (
            ("max_tokens", "at least 1", self.max_tokens is None or self.max_tokens >= 1),
            ("temperature", "finite and at least 0", 0 <= self.temperature < math.inf),
            ("top_k", "at least 0", self.top_k >= 0),
            ("top_p", "above 0 and at most 1", 0 < self.top_p <= 1),
            ("seed", f"from {least} to {most}", self.seed is None or least <= self.seed <= most),
            ("stop", "a list of texts", not isinstance(self.stop, str)),
        )
        for name, expected, holds in checks:
            if not holds:
                raise RequestError(f"{name} must be {expected}, not {getattr(self, name)!r}")


@dataclass(frozen=True)
class Delta:
    """What a step added to an answer.

    Attributes:
        text: new text; may be empty while a character or a stop text is incomplete.
        num_tokens: generated so far.
        finished: why the answer ended, or `None`.
        error: what went wrong, when `finished` is `error`.
    """

    text: str
    num_tokens: int
    finished: FinishReason | None = None
    error: str = ""


@dataclass(eq=False)
class Request:
    """A request and its state; the scheduler counts tokens, the engine fills in the answer.

    Attributes:
        id: unique in the engine.
        prompt: token ids.
        adapter: key of the adapter in the engine's pool, or `None` for the base.
        sampling: how tokens are chosen.
        on_delta: called in the engine's thread after each step that adds something.
        output: ids generated so far.
        num_computed: leading tokens whose keys and values are in the pool.
        text: answer so far.
        finished: why it ended.
        error: what went wrong, when `finished` is `error`.
    """

    id: str
    prompt: list[int]
    adapter: str | None = None
    sampling: Sampling = Sampling()
    on_delta: Callable[[Delta], None] | None = None
    output: list[int] = field(default_factory=list)
    num_computed: int = 0
    text: str = ""
    finished: FinishReason | None = None
    error: str = ""
    arrived: float = field(default_factory=time.monotonic)

    @property
    def tokens(self) -> list[int]:
        """Prompt and answer."""
        return self.prompt + self.output

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.prompt) + len(self.output)

    @property
    def num_pending(self) -> int:
        """Tokens whose keys and values are not computed yet; 1 while decoding."""
        return self.num_tokens - self.num_computed

    @property
    def max_tokens(self) -> int:
        """Tokens that prompt and answer can come to."""
        assert self.sampling.max_tokens is not None, "the engine fills it in"
        return len(self.prompt) + self.sampling.max_tokens
