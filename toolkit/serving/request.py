"""One request to the engine: what was asked for, and how far it is."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from toolkit.errors import RequestError
from toolkit.serving.guide import Guide
from toolkit.serving.mix import Mix
from toolkit.serving.pages import Block

SEEDS = (-(2**63), 2**64 - 1)
"""Smallest and largest seed that torch's generators take."""

MOST_LOGPROBS = 20
"""Alternatives of a token that a request can ask for."""

MOST_BIAS, MOST_PENALTY = 100.0, 2.0
"""Largest logit bias, and largest presence and frequency penalty, as OpenAI has them."""

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        max_tokens: most tokens to generate; `None` for the engine's `limits.default_max_tokens`, or as many as fit;
            0 to score a prompt.
        temperature: of the softmax; 0, or less than 1e-5, takes the most likely token.
        top_k: choose among this many most likely tokens; 0 among all.
        top_p: choose among the fewest tokens that hold this much of the probability.
        min_p: choose among tokens at least this many times as likely as the most likely one.
        presence_penalty: taken off the logit of every token that the answer has.
        frequency_penalty: taken off the logit of a token once for each time that the answer has it.
        repetition_penalty: divides positive logits of tokens of prompt and answer, and multiplies negative ones.
        logit_bias: added to the logits of tokens.
        seed: makes the choice reproducible, whatever else is in the batch.
        stop: texts that end the answer; they are not part of it.
        stop_token_ids: tokens that end it, besides the model's own.
        ignore_eos: go on after the model's end token.
        logprobs: note each token's log-probability and this many alternatives.
        prompt_logprobs: the same for the tokens of the prompt, but the first.
        guide: the form that the answer must have; one that `max_tokens` or `stop` cuts is a beginning of it.

    Raises:
        RequestError: a value that means nothing.
    """

    max_tokens: int | None = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    guide: Guide | None = None

    def __post_init__(self) -> None:
        for name, expected, holds in (*self._checks(), *self._penalty_checks()):
            if not holds:
                raise RequestError(f"{name} must be {expected}, not {getattr(self, name)!r}")

    def _checks(self) -> Sequence[tuple[str, str, bool]]:
        least, most = SEEDS
        counts = f"from 0 to {MOST_LOGPROBS}"
        return (
            ("max_tokens", "at least 0", self.max_tokens is None or self.max_tokens >= 0),
            ("temperature", "finite and at least 0", 0 <= self.temperature < math.inf),
            ("top_k", "at least 0", self.top_k >= 0),
            ("top_p", "above 0 and at most 1", 0 < self.top_p <= 1),
            ("min_p", "from 0 to 1", 0 <= self.min_p <= 1),
            ("seed", f"from {least} to {most}", self.seed is None or least <= self.seed <= most),
            ("stop", "a list of texts", not isinstance(self.stop, str)),
            ("ignore_eos", "false where the answer has a form", not (self.ignore_eos and self.guide)),
            ("logprobs", counts, self.logprobs is None or 0 <= self.logprobs <= MOST_LOGPROBS),
            ("prompt_logprobs", counts, self.prompt_logprobs is None or 0 <= self.prompt_logprobs <= MOST_LOGPROBS),
        )

    def _penalty_checks(self) -> Sequence[tuple[str, str, bool]]:
        penalty = f"from {-MOST_PENALTY:g} to {MOST_PENALTY:g}"
        biases = self.logit_bias.items()
        return (
            ("presence_penalty", penalty, abs(self.presence_penalty) <= MOST_PENALTY),
            ("frequency_penalty", penalty, abs(self.frequency_penalty) <= MOST_PENALTY),
            # Outside of this a logit could overflow.
            ("repetition_penalty", "from 0.01 to 100", 0.01 <= self.repetition_penalty <= 100),
            (
                "logit_bias",
                f"token ids with values from {-MOST_BIAS:g} to {MOST_BIAS:g}",
                all(token >= 0 and abs(value) <= MOST_BIAS for token, value in biases),
            ),
        )

    @property
    def changes_logits(self) -> bool:
        """Whether a bias or a penalty is asked for."""
        penalties = self.presence_penalty, self.frequency_penalty, self.repetition_penalty
        return penalties != (0, 0, 1) or bool(self.logit_bias)


@dataclass(frozen=True)
class TokenLogprob:
    """How likely a token was.

    Attributes:
        token: its id.
        logprob: natural logarithm of its probability; may be -inf.
        top: the most likely tokens and theirs, the best first; the token itself is among them or not.
        offset: characters of the answer before the token's own.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    offset: int = 0


@dataclass(frozen=True)
class Delta:
    """What a step added to an answer.

    Attributes:
        text: new text; may be empty while a character or a stop text is incomplete.
        num_tokens: generated so far.
        finished: why the answer ended, or `None`.
        error: what went wrong, when `finished` is `error`.
        timed_out: it went wrong because the request's time was over.
        logprob: of the token that was added, where the request asks for it.
    """

    text: str
    num_tokens: int
    finished: FinishReason | None = None
    error: str = ""
    logprob: TokenLogprob | None = None
    timed_out: bool = False


@dataclass(eq=False)
class Request:
    """A request and its state; the scheduler counts tokens, the engine fills in the answer.

    Attributes:
        id: unique in the engine.
        prompt: token ids.
        mix: adapters that it is answered by.
        sampling: how tokens are chosen.
        on_delta: called in the engine's thread after each step that adds something.
        key: who asks, for fairness between them; the empty text where nobody says.
        priority: lower ones go first, and may put running requests of higher ones back into the queue.
        deadline: on `time.monotonic`'s clock, after which the request ends with an error.
        num_virtual: tokens that the adapters put before the prompt.
        is_apart: its keys and values are in a cache of its own, and not in its pages.
        output: ids generated so far.
        num_computed: leading tokens whose keys and values are in the pool.
        num_cached: of those, tokens that were there when the request last started.
        blocks: that hold them, one page each.
        page_keys: of its first pages in the prefix cache.
        num_preemptions: times that it was put back into the queue.
        text: answer so far.
        finished: why it ended.
        error: what went wrong, when `finished` is `error`.
        logprobs: of the output's tokens, where the request asks for them.
        prompt_logprobs: of the prompt's tokens but the first.
    """

    id: str
    prompt: list[int]
    mix: Mix = Mix()
    sampling: Sampling = Sampling()
    on_delta: Callable[[Delta], None] | None = None
    key: str = ""
    priority: int = 0
    deadline: float | None = None
    num_virtual: int = 0
    is_apart: bool = False
    output: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_cached: int = 0
    blocks: list[Block] = field(default_factory=list)
    page_keys: list[bytes] = field(default_factory=list)
    num_preemptions: int = 0
    text: str = ""
    finished: FinishReason | None = None
    error: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
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

    @property
    def shares_pages(self) -> bool:
        """Whether its pages hold what the same tokens would put there in any other request."""
        return not self.num_virtual and not self.is_apart

    @property
    def pages(self) -> list[int]:
        """Its block table."""
        return [block.pages[0] for block in self.blocks]
