"""Meta Ranking: judge an answer by comparing it with a few answers that are known to be right or wrong.

Liu et al., "Enabling weak LLMs to judge response reliability via meta ranking", 2024. A weak model cannot say whether
an answer is right, but it can often say which of two answers, to two different questions, is the better one. Each
reference is compared in both orders, and half the difference counts, so that a liking for the first place cancels.
The reliability is the mean comparison with right references plus the mean comparison with wrong ones, -2 to 2: a
right answer is no worse than right ones and better than wrong ones. Above 0, an answer looks right. (How the paper
weighs the votes, its abstract does not say; equal weights of both kinds are ours.)
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from toolkit.errors import DataError
from toolkit.routing.cascade import Completion, Model


@dataclass(frozen=True)
class Reference:
    """An answer of which it is known whether it is right."""

    prompt: str
    response: str
    correct: bool


Comparator = Callable[[tuple[str, str], tuple[str, str]], float]
"""Compares two pairs of prompt and response: 1 where the first is the better one, -1 the second, 0 neither."""


@dataclass(frozen=True)
class MetaRanking:
    """A judge for `Cascade`.

    Attributes:
        references: at least one right and one wrong; five in all are enough in the paper.
        compare: a weak model's opinion, such as `AskedComparator`.

    Raises:
        DataError: no right reference, or no wrong one.
    """

    references: Sequence[Reference]
    compare: Comparator

    def __post_init__(self) -> None:
        if len({reference.correct for reference in self.references}) < 2:
            raise DataError("meta ranking needs references of both kinds: right and wrong answers")

    def __call__(self, prompt: str, completion: Completion) -> float:
        """Return the reliability of an answer, -2 to 2."""
        return self.reliability(prompt, completion.text)

    def reliability(self, prompt: str, response: str) -> float:
        """Return the reliability of a response, -2 to 2."""
        votes: dict[bool, list[float]] = {True: [], False: []}
        for reference in self.references:
            known = (reference.prompt, reference.response)
            vote = (self.compare((prompt, response), known) - self.compare(known, (prompt, response))) / 2
            votes[reference.correct].append(vote)
        # `fsum` is exact, so the order of the references does not matter to the bit.
        return math.fsum(math.fsum(cast) / len(cast) for cast in votes.values())


QUESTION = """\
Two questions, each with an answer.

Question A: {a[0]}
Answer A: {a[1]}

Question B: {b[0]}
Answer B: {b[1]}

Which answer is more correct for its own question? Reply with one word: A, B, or SAME.
Reply:"""


@dataclass(frozen=True)
class AskedComparator:
    """Asks a model which of two answers is the better one.

    Attributes:
        model: a weak one will do.
        question: with `{a[0]}`, `{a[1]}`, `{b[0]}` and `{b[1]}` where the two prompts and responses go.
    """

    model: Model
    question: str = QUESTION

    def __call__(self, a: tuple[str, str], b: tuple[str, str]) -> float:
        """Return 1 for A, -1 for B, 0 for anything else."""
        reply = self.model(self.question.format(a=a, b=b)).text
        found = re.search(r"\b(A|B|SAME)\b", reply)
        return {"A": 1.0, "B": -1.0}.get(found[1], 0.0) if found else 0.0
