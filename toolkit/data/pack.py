"""Put short examples together into long ones without letting them see each other.

A packed example carries `position_ids` that start anew in every document and no attention mask: transformers
then builds a mask that keeps documents apart. With a mask of ones, or with a cache (`use_cache=True`, the default
outside of training), it would not, silently.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

from toolkit.data.render import IGNORED, Example


@dataclass(frozen=True)
class Packed:
    """Several documents in one row.

    Attributes:
        tokens: ids of all documents.
        labels: as of the documents, but for the first token of each, which no other document may predict.
        positions: position of each token in its document.
        task: number of the task of all its documents, where that matters.
    """

    tokens: list[int]
    labels: list[int]
    positions: list[int]
    task: int = 0


def alone(example: Example) -> Packed:
    """Return an example as a row of its own."""
    return concatenate([example])


def concatenate(examples: Sequence[Example | Packed]) -> Packed:
    """Put examples of one task one after another."""
    tokens: list[int] = []
    labels: list[int] = []
    positions: list[int] = []
    for example in examples:
        tokens += example.tokens
        labels += [IGNORED, *example.labels[1:]]
        positions += range(len(example.tokens))
    return Packed(tokens, labels, positions, examples[0].task)


def pack(examples: Sequence[Example | Packed], length: int) -> list[Packed]:
    """Distribute examples, or rows of one document, over rows of at most `length` tokens.

    Best fit, longest first: each example goes where the least room is left. Deterministic.
    """
    bins: list[list[Example | Packed]] = []
    room: list[tuple[int, int]] = []  # (tokens left, index of the bin), sorted
    for example in sorted(examples, key=lambda e: -len(e.tokens)):
        size = len(example.tokens)
        at = bisect_left(room, (size, -1))
        if at < len(room):
            left, index = room.pop(at)
        else:
            left, index = length, len(bins)
            bins.append([])
        bins[index].append(example)
        insort(room, (left - size, index))
    return [concatenate(documents) for documents in bins]
