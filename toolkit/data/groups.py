"""Rows of several texts that are learned together, such as a pair of answers, or of a text with its class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from toolkit.data.collate import Collator
from toolkit.data.pack import Packed
from toolkit.data.render import IGNORED

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Group:
    """Texts of one row.

    Attributes:
        texts: in the order that the objective gives them.
        label: number of its class, or 0 where there are none; -100 in a row that only fills a batch.
        task: number of its task.
    """

    texts: tuple[Packed, ...]
    label: int = 0
    task: int = 0

    @property
    def tokens(self) -> list[int]:
        """Tokens of the longest text, to which the others are padded."""
        return max((text.tokens for text in self.texts), key=len)


Item = Packed | Group
"""What a batch is made of."""


def num_tokens(item: Item) -> int:
    """Return the tokens of all texts of an item."""
    return len(item.tokens) if isinstance(item, Packed) else sum(len(text.tokens) for text in item.texts)


def num_trained(item: Item) -> int:
    """Return the tokens of an item that a loss over tokens has."""
    texts = (item,) if isinstance(item, Packed) else item.texts
    return sum(label != IGNORED for text in texts for label in text.labels)


def blank(item: Item) -> Item:
    """Return an item from which nothing is learned; of a group the first two texts are left."""
    if isinstance(item, Packed):
        return replace(item, labels=[IGNORED] * len(item.labels))
    texts = tuple(replace(text, labels=[IGNORED] * len(text.labels)) for text in item.texts[:2])
    return replace(item, texts=texts, label=IGNORED)


class GroupCollator:
    """Makes one rectangle of the texts of groups: the first of every group, then the second of every group, and so on.

    Args:
        collate: makes it.
    """

    def __init__(self, collate: Collator) -> None:
        self.collate = collate

    def __call__(self, groups: Sequence[Group]) -> dict[str, Any]:
        """Return what the collator does, `[N, T]` each for `N` texts; `lengths` `[N]`; `classes` `[B]` of groups."""
        import torch

        most = max(len(group.texts) for group in groups)
        texts = [group.texts[i] for i in range(most) for group in groups if i < len(group.texts)]
        batch: dict[str, torch.Tensor] = self.collate(texts)
        if "task_ids" in batch:
            batch["task_ids"] = torch.tensor([group.task for group in groups])
        lengths = torch.tensor([len(text.tokens) for text in texts])
        return {**batch, "lengths": lengths, "classes": torch.tensor([group.label for group in groups])}
