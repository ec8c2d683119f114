"""Ask the cheap model first, and the strong one where the cheap answer does not look reliable.

A model is anything that turns a prompt into a `Completion`: `Endpoint` for any server with OpenAI's API. A judge is
anything that turns a prompt and its completion into a number, the larger the more reliable: `confidence`, from the
model's own token probabilities, or `MetaRanking`, a weak model that compares the answer with known ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from toolkit.tables import Report, Table


@dataclass(frozen=True)
class Completion:
    """A model's answer.

    Attributes:
        text: the answer.
        logprobs: of its tokens, natural logarithms, where the model gives them.
        cost: in any unit.
    """

    text: str
    logprobs: tuple[float, ...] = ()
    cost: float = 0.0


class Model(Protocol):
    """Answers prompts."""

    name: str

    def __call__(self, prompt: str) -> Completion:
        """Answer one prompt."""
        ...


Judge = Callable[[str, Completion], float]
"""Tells how reliable an answer to a prompt is; the larger the better."""


def confidence(prompt: str, completion: Completion) -> float:
    """Return the geometric mean of the token probabilities, 0 to 1; 0 where the model gave none."""
    logprobs = completion.logprobs
    return math.exp(sum(logprobs) / len(logprobs)) if logprobs else 0.0


@dataclass(frozen=True)
class Stage:
    """One model that was asked.

    Attributes:
        model: its name.
        text: what it said.
        reliability: what the judge made of it, where it was asked.
        cost: of the answer.
    """

    model: str
    text: str
    reliability: float | None
    cost: float


@dataclass(frozen=True)
class CascadeAnswer(Report):
    """What a cascade answers.

    Attributes:
        text: the answer; none where the cascade abstains.
        model: what gave it.
        stages: every model that was asked, in order.
        cost: of all of them.
    """

    text: str | None = None
    model: str | None = None
    stages: Sequence[Stage] = field(default_factory=tuple)
    cost: float = 0.0


class Cascade:
    """Asks models from cheap to strong until an answer is reliable enough.

    Args:
        models: cheap ones first.
        judge: of every answer that could still be passed on, or abstained from.
        threshold: reliability from which an answer is taken: minus infinity takes the first model's, infinity the
            last one's.
        abstain: reliability below which even the last answer is withheld; none never.
    """

    def __init__(self, models: Sequence[Model], judge: Judge, threshold: float, abstain: float | None = None) -> None:
        if not models:
            raise ValueError("a cascade needs a model")
        self.models, self.judge, self.threshold, self.abstain = list(models), judge, threshold, abstain

    def __call__(self, prompt: str) -> CascadeAnswer:
        """Answer one prompt."""
        stages: list[Stage] = []
        for place, model in enumerate(self.models):
            last = place == len(self.models) - 1
            completion = model(prompt)
            judged = not last or self.abstain is not None
            reliability = self.judge(prompt, completion) if judged else None
            stages.append(Stage(model.name, completion.text, reliability, completion.cost))
            if not last and reliability is not None and reliability >= self.threshold:
                break
        return self._answer(stages)

    def _answer(self, stages: list[Stage]) -> CascadeAnswer:
        final = stages[-1]
        reliable = self.abstain is None or final.reliability is None or final.reliability >= self.abstain
        text, model = (final.text, final.model) if reliable else (None, None)
        cost = math.fsum(stage.cost for stage in stages)
        numbers: dict[str, Any] = {"text": text, "model": model, "cost": cost}
        numbers["stages"] = [vars(stage) for stage in stages]
        rows = [[stage.model, stage.reliability, stage.cost, stage.text] for stage in stages]
        table = Table(("asked", "reliability", "cost", "answer"), rows, digits=3)
        return CascadeAnswer(numbers, [table], text, model, tuple(stages), cost)
