"""In which order a batch of prompts that are all known is best answered.

Prompts that begin alike come one after another, so that what they share is computed once and kept no longer than it is
used; groups that generate much for what they read come first, so that their answers fill the steps in which later
prompts are read (Zheng et al., "BatchLLM: Optimizing Large Batched LLM Inference with Global Prefix Sharing and
Throughput-oriented Token Batching", 2024, arXiv:2412.03594).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import pairwise


def batch_order(
    prompts: Sequence[Sequence[int]], answers: Sequence[int], owners: Sequence[Hashable], page_size: int
) -> list[int]:
    """Return the indices of requests in the order in which they should start.

    Args:
        prompts: token ids.
        answers: tokens that each may generate.
        owners: adapters of each; nothing is shared between two of them.
        page_size: tokens that must be equal for anything to be shared.
    """
    places: dict[Hashable, int] = {}
    for owner in owners:
        places.setdefault(owner, len(places))
    # In the order of their tokens, prompts lie as in a walk through the trie of all of them.
    walk = sorted(range(len(prompts)), key=lambda i: (places[owners[i]], list(prompts[i]), i))
    groups: list[list[int]] = []
    for i in walk:
        last = groups[-1][-1] if groups else None
        if last is not None and owners[last] == owners[i] and shared(prompts[last], prompts[i]) >= page_size:
            groups[-1].append(i)
        else:
            groups.append([i])
    groups.sort(key=lambda group: (-_ratio(group, prompts, answers), min(group)))
    return [i for group in groups for i in group]


def shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens two prompts have in common at their beginnings."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _ratio(group: Sequence[int], prompts: Sequence[Sequence[int]], answers: Sequence[int]) -> float:
    """Return the tokens that a group generates for each that it computes of its prompts."""
    read = len(prompts[group[0]])
    for before, i in pairwise(group):
        read += len(prompts[i]) - shared(prompts[before], prompts[i])
    return sum(answers[i] for i in group) / max(1, read)
